"""Serve the newest numbers of a run for Prometheus, over HTTP.

``prometheus_client`` formats and serves them. The numbers are those of the last report: no history is kept.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError, install_command
from ..schedule import Progress
from .observer import Observer, RunDescription, StepRecord

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "retemper"


def require_server(port: int) -> None:
    """Check that the numbers can be served on ``port``.

    Raises:
        UserError: ``prometheus_client`` is not installed, or another program uses the port.
    """
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        command = install_command("prometheus_client")
        raise UserError(f"logging.metrics_port {port} needs prometheus_client: {command}") from None
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"logging.metrics_port {port} cannot be used: {error.strerror or error}; choose another port, or set it "
            "to null"
        ) from None


class MetricsServer(Observer):
    """Serves the newest numbers at ``http://HOST:port/metrics``, from :meth:`open` to :meth:`end`.

    Args:
        port: on all interfaces of this machine.
    """

    def __init__(self, port: int):
        self._port = port
        self._server: Any = None
        self._info: dict[str, str] = {}
        self._progress: Progress | None = None
        self._numbers: dict[str, float] = {}
        """Of the last step."""
        self._evaluations: dict[str, dict[str, float]] = {}
        """Of the last evaluation, by name of the set, or ``set/source``."""

    def open(self, run: RunDescription) -> None:
        """See :class:`Observer`."""
        from prometheus_client import CollectorRegistry, start_http_server

        self._info = {
            "run_folder": str(run.folder),
            "model_type": str(run.model["model_type"]),
            "world_size": str(run.world_size),
            "version": str(run.code["retemper"]),
        }
        registry = CollectorRegistry()
        registry.register(self)
        self._server, _ = start_http_server(self._port, registry=registry)

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self._progress = record.progress
        remaining = {"remaining_steps": record.remaining_steps, "remaining_seconds": record.seconds_left}
        self._numbers = _numbers({**record.values, **remaining})

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        self._evaluations = {**self._evaluations, name: _numbers(values)}

    def end(self, summary: Mapping[str, Any]) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; the registry calls this in a thread of the server."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily(f"{PREFIX}_run_info", "Facts about the run.", labels=list(self._info))
        info.add_metric(list(self._info.values()), 1)
        yield info
        if self._progress is not None:
            yield CounterMetricFamily(f"{PREFIX}_steps", "Optimizer steps of the run.", self._progress.step)
            yield CounterMetricFamily(f"{PREFIX}_tokens", "Tokens that the run has consumed.", self._progress.tokens)
        for key, value in self._numbers.items():
            yield GaugeMetricFamily(_metric_name(key), f"{key} of the last reported step.", value)
        evaluations = self._evaluations
        for key in dict.fromkeys(key for numbers in evaluations.values() for key in numbers):
            gauge = GaugeMetricFamily(
                _metric_name(f"evaluation_{key}"), f"{key} of the last evaluation.", labels=["set", "source"]
            )
            for name, numbers in evaluations.items():
                if key in numbers:
                    of_set, _, source = name.partition("/")
                    gauge.add_metric([of_set, source], numbers[key])
            yield gauge


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}


def _metric_name(key: str) -> str:
    return f"{PREFIX}_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}"
