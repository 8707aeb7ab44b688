"""MLflow: https://mlflow.org."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..observer import Sample
from .client import TrackedRun, TrackerClient
from .facts import flat

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ID_TAG = "retemper.run_id"
"""MLflow chooses the ids of runs; this tag has ours, by which a resumed run finds its run."""
_LONGEST_KEY, _LONGEST_VALUE, _MOST_PARAMS = 250, 6000, 100
"""Limits of MLflow: characters of a parameter, and parameters in a request."""
_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")


class MLflow(TrackerClient):
    """Writes to the server of MLFLOW_TRACKING_URI, or to a file store in the run folder if there is none."""

    def __init__(self) -> None:
        self._client: MlflowClient
        self._run_id = ""

    def connect(self, run: TrackedRun) -> str:
        """See :class:`TrackerClient`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        uri = None if mlflow.is_tracking_uri_set() and not run.offline else (run.folder / "mlflow").as_uri()
        if uri is not None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # otherwise MLflow asks for a database
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        found = self._client.search_runs([experiment_id], f"tags.`{_ID_TAG}` = '{run.id}'") if run.exists else []
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._create(run, experiment_id)
        return f"run {self._run_id} of experiment {run.project} in {uri or 'the server of MLFLOW_TRACKING_URI'}"

    def _create(self, run: TrackedRun, experiment_id: str) -> None:
        tags = {_name(tag): "true" for tag in run.tags} | {_ID_TAG: run.id}
        if run.group:
            tags["group"] = run.group
        if commit := run.facts["code"].get("git_commit"):
            tags["mlflow.source.git.commit"] = commit
        self._run_id = self._client.create_run(experiment_id, tags=tags, run_name=run.name).info.run_id
        self._log_params({**flat(run.config), **flat(run.facts, "facts")})
        self._client.log_dict(self._run_id, dict(run.config), "config.yaml")
        self._client.log_dict(self._run_id, dict(run.facts), "facts.json")

    def _log_params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        named = {_name(key): str(value)[:_LONGEST_VALUE] for key, value in values.items()}
        params = [Param(key, value) for key, value in named.items()]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MOST_PARAMS])

    def key(self, name: str) -> str:
        """See :class:`TrackerClient`."""
        return _name(name)

    def recorded(self) -> Mapping[str, int]:
        """See :class:`TrackerClient`."""
        names = self._client.get_run(self._run_id).data.metrics
        histories = {name: self._client.get_metric_history(self._run_id, name) for name in names}
        return {name: max(metric.step for metric in history) for name, history in histories.items() if history}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrackerClient`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """See :class:`TrackerClient`."""
        rows = [sample._asdict() for sample in samples]
        self._client.log_dict(self._run_id, {"step": step, "samples": rows}, f"samples/step-{step:08d}.json")

    def finish(self, summary: Mapping[str, float], finished: bool, report: Path | None) -> None:
        """See :class:`TrackerClient`."""
        self._client.log_dict(self._run_id, dict(summary), "summary.json")
        if report is not None:
            self._client.log_artifact(self._run_id, str(report))
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


def _name(text: str) -> str:
    """Return ``text`` as MLflow allows names: with some characters only, and so that it can be the path of a file."""
    allowed, half = _NOT_ALLOWED.sub("_", text), _LONGEST_KEY // 2
    if len(allowed) > _LONGEST_KEY:
        allowed = allowed[:half] + allowed[-half:]
    return "/".join(filter(None, (part.strip(".") for part in allowed.split("/")))) or "_"
