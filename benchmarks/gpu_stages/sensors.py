"""Log clocks, power, temperature and memory of a GPU while stages run."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "celsius": "temperature.gpu",
    "busy_percent": "utilization.gpu",
    "used_mib": "memory.used",
}
"""Names of the readings, and what nvidia-smi calls them."""
NVIDIA_SMI = ["nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"]
_QUERY_SECONDS = 10.0
"""A query that takes longer is given up."""


@dataclass
class Sensors:
    """Reads the first GPU in a thread, once per interval; a machine without the tool has no readings."""

    command: Sequence[str] = tuple(NVIDIA_SMI)
    interval_seconds: float = 1.0
    readings: list[dict[str, float]] = field(default_factory=list)
    """Values by the names of :data:`FIELDS`, and ``at``: the seconds of :func:`time.monotonic`."""
    problem: str | None = None
    """Why the last query gave nothing."""

    def __enter__(self) -> Sensors:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(1.0)  # a query that hangs delays nothing

    def _run(self) -> None:
        while True:
            self.read()
            if self._stopped.wait(self.interval_seconds):
                return

    def read(self) -> None:
        """Query the GPU once."""
        at = time.monotonic()
        try:
            printed = subprocess.run(
                self.command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True
            ).stdout
            values = [_number(text) for text in printed.splitlines()[0].split(",")]
            found = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
        except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
            self.problem = f"{type(error).__name__}: {error}"[:200]
            return
        self.readings.append({"at": at, **found})

    def summarize(self, begin: float, end: float) -> dict[str, Any] | str:
        """Return least, median and largest of each value between two moments, or "not available"."""
        readings = [reading for reading in self.readings if begin <= reading["at"] <= end]
        found = {name: [one[name] for one in readings if name in one] for name in FIELDS}
        summary = {
            name: {"least": min(values), "median": statistics.median(values), "most": max(values)}
            for name, values in found.items()
            if values
        }
        return summary or "not available"


DESCRIBED = {"SM clock, MHz": "sm_mhz", "power, W": "power_watts", "temperature, C": "celsius", "used, MiB": "used_mib"}
"""Columns of the table of readings."""


def describe(summary: dict[str, Any] | str) -> list[str]:
    """Return the readings of a stage for the columns of :data:`DESCRIBED`: the median, and the extremes."""
    if isinstance(summary, str):
        return [summary, *("" for _ in range(len(DESCRIBED) - 1))]
    values = [summary.get(name) for name in DESCRIBED.values()]
    return ["{median:.0f} ({least:.0f} to {most:.0f})".format(**one) if one else "" for one in values]


def _number(text: str) -> float | None:
    """Return a reading, or None if the GPU does not have it: ``[N/A]``."""
    try:
        return float(text)
    except ValueError:
        return None
