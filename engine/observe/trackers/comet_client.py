"""Comet: https://www.comet.com."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..observer import Sample
from .client import TrackedRun, TrackerClient
from .facts import flat

_NOTHING_BUT_OURS = {
    "log_code": False,
    "log_graph": False,
    "auto_param_logging": False,
    "auto_metric_logging": False,
    "parse_args": False,
    "auto_output_logging": False,
    "log_env_details": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "display_summary_level": 0,
}
"""Comet records no command line, environment or output, which may contain secrets."""


class Comet(TrackerClient):
    """Writes to the server of COMET_API_KEY, or offline to archives in the run folder, which `comet upload` sends."""

    def __init__(self) -> None:
        self._experiment: Any = None
        self._folder: Path | None = None
        """Of the archives, if offline."""

    def connect(self, run: TrackedRun) -> str:
        """See :class:`TrackerClient`."""
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        import comet_ml

        settings: dict[str, Any] = {**_NOTHING_BUT_OURS, "project_name": run.project}
        if run.offline:
            self._folder = run.folder / "comet"
            self._folder.mkdir(parents=True, exist_ok=True)
            settings["offline_directory"] = str(self._folder)
        if run.exists:
            kind = comet_ml.ExistingOfflineExperiment if run.offline else comet_ml.ExistingExperiment
            self._experiment = kind(previous_experiment=run.id, **settings)
        else:
            kind = comet_ml.OfflineExperiment if run.offline else comet_ml.Experiment
            self._experiment = kind(experiment_key=run.id, **settings)
            self._describe(run)
        return str(self._folder) if self._folder else str(self._experiment.url)

    def _describe(self, run: TrackedRun) -> None:
        self._experiment.set_name(run.name)
        self._experiment.add_tags([*run.tags, *([run.group] if run.group else [])])
        self._experiment.log_parameters({key: str(value) for key, value in flat(run.config).items()})
        self._experiment.log_others({key: str(value) for key, value in flat(run.facts, "facts").items()})

    def recorded(self) -> Mapping[str, int] | None:
        """See :class:`TrackerClient`."""
        if self._folder is None:
            return None
        last: dict[str, int] = {}
        for path in sorted(self._folder.glob(f"{self._experiment.get_key()}*.zip")):
            for metric in metrics(path):
                name, step = metric["metricName"], metric["step"]
                last[name] = max(step, last.get(name, step))
        return last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrackerClient`."""
        self._experiment.log_metrics(dict(values), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """See :class:`TrackerClient`."""
        for sample in samples:
            self._experiment.log_text(sample.prompt + sample.text, step=step, metadata={"prompt": sample.prompt})

    def finish(self, summary: Mapping[str, float], finished: bool, report: Path | None) -> None:
        """See :class:`TrackerClient`."""
        self._experiment.log_others(dict(summary))
        if report is not None:
            self._experiment.log_asset(str(report), file_name=report.name)
        self._experiment.end()


def metrics(archive: Path) -> list[dict[str, Any]]:
    """Return the points in an archive of an offline experiment: ``metricName``, ``metricValue``, ``step``.

    The archive of a running or killed experiment has none.
    """
    with suppress(zipfile.BadZipFile, KeyError), zipfile.ZipFile(archive) as file:
        messages = map(json.loads, file.read("messages.json").splitlines())
        return [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    return []
