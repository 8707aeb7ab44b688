"""Runs without training whose records go to trackers, and what the trackers' own readers find."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from retemper.engine.config.settings import LoggingConfig
from retemper.engine.observe.metrics_file import MetricsFile
from retemper.engine.observe.observer import Observer, RunDescription, Sample, StepRecord
from retemper.engine.observe.trackers.all_trackers import Trackers
from retemper.engine.observe.trackers.creation import create_trackers
from retemper.engine.observe.trackers.record_files import last_steps_in_wandb
from retemper.engine.schedule import Progress

Curves = dict[str, list[tuple[int, float]]]
"""Points of each metric, by step, in the order in which the tracker has them."""


def description(folder: Path, logging: LoggingConfig, **more) -> RunDescription:
    """The facts of a run that exists only in its records."""
    config = {"logging": asdict(logging), "optimizer": {"learning_rate": 1e-3}, "data": {"train": [{"path": "a"}]}}
    return RunDescription(
        folder=folder,
        config=config,
        model={"model_type": "qwen2", "parameters": 12},
        datasets={"a": {"tokens": 7}},
        code={"retemper": "1.0"},
        world_size=1,
        **{"resumed": False, **more},
    )


class Play:
    """A start of a run: its records, without training.

    Args:
        folder: of the run.
        names: of its trackers.
        after_step: the checkpoint that it resumes from.
        ids: its runs in the trackers, from that checkpoint.
        settings: of its logging.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], after_step: int | None = None, ids: dict | None = None, **settings
    ):
        self.lines: list[str] = []
        logging = LoggingConfig(trackers=list(names), offline=True, **settings)
        config, say = SimpleNamespace(run_folder=str(folder), logging=logging), self.lines.append
        self._observers: list[Observer] = [MetricsFile(folder, say), *create_trackers(config, say)]
        last = list(_metrics(folder)) if after_step is not None else []
        run = description(
            folder,
            logging,
            resumed=after_step is not None,
            tracker_runs=ids or {},
            recorded_step=last[-1]["step"] if last else None,
        )
        for observer in self._observers:
            observer.open(run)
        self.go_back(after_step)

    @property
    def ids(self) -> dict[str, str]:
        """The runs in the trackers that a checkpoint of now records."""
        (trackers,) = (observer for observer in self._observers if isinstance(observer, Trackers))
        return trackers.run_ids

    def go_back(self, after_step: int | None) -> None:
        """Start, or roll back to a checkpoint."""
        for observer in self._observers:
            observer.start(after_step, False)

    def steps(self, steps: Iterable[int], shift: float = 0.0) -> None:
        """Record steps; an evaluation after every fifth."""
        for step in steps:
            progress = Progress(step, step, 10 * step)
            values = {"loss": 1 / step + shift, "learning_rate": 1e-3, "grad_norm": None, "speed": math.nan}
            for observer in self._observers:
                observer.step(StepRecord(progress, values, 0, 0.0, []))
                if step % 5 == 0:
                    observer.evaluation(progress, "held out", {"loss": 2 / step, "perplexity": math.exp(2 / step)})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record generated texts."""
        for observer in self._observers:
            observer.samples(Progress(step, step, 10 * step), samples)

    def end(self) -> None:
        """The regular end."""
        for observer in self._observers:
            observer.end({"finished": True, "step": 3, "losses": {"training": {"last": (1.5, 3)}}})


def wait_for_trackers(folder: Path, ids: dict[str, str], step: int) -> None:
    """Wait until wandb, mlflow and trackio have written a step of a run of this process."""

    def written() -> Iterable[int]:
        yield last_steps_in_wandb(folder / "trackers" / "wandb", ids["wandb"]).get("train/loss", 0)
        yield max(step for step, _ in mlflow_curves(folder, ids["mlflow"])["train/loss"])
        with contextlib.closing(sqlite3.connect(folder / "trackers" / "trackio" / "retemper.db")) as database:
            yield database.execute("select max(step) from metrics").fetchone()[0] or 0

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError, KeyError, sqlite3.Error):  # a tracker has no run yet
            if min(written()) >= step:
                return
        time.sleep(0.2)
    raise TimeoutError


def _metrics(folder: Path) -> Iterable[dict]:
    return map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())


def metrics_curves(folder: Path) -> Curves:
    """The curves of metrics.jsonl, under the names that trackers and TensorBoard use."""
    curves: Curves = defaultdict(list)
    for record in _metrics(folder):
        step, group = record.pop("step"), record.pop("evaluation", None)
        for key, value in record.items():
            if value is not None:
                curves[f"evaluation/{group}/{key}" if group else f"train/{key}"].append((step, value))
    return dict(curves)


def wandb_records(folder: Path) -> list[dict]:
    """The records of wandb's offline files, as wandb's own command prints them."""
    found = []
    for path in sorted((folder / "trackers" / "wandb").glob("offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, check=True
        )
        found += [{**json.loads(line), "run_id": path.stem.removeprefix("run-")} for line in done.stdout.splitlines()]
    return found


def wandb_curves(folder: Path, run_id: str) -> Curves:
    """The curves of a run in all of wandb's files."""
    curves: Curves = defaultdict(list)
    for record in wandb_records(folder):
        if record["type"] == "history" and record["run_id"] == run_id:
            for name, value in record["history"]["item"].items():
                if not name.startswith("_") and isinstance(value, (int, float)):
                    curves[name].append((record["history"]["step"]["num"], value))
    return dict(curves)


def mlflow_run(folder: Path, run_id: str):
    """MLflow's client, and the run that has our id."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient((folder / "trackers" / "mlflow").absolute().as_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`retemper.run_id` = '{run_id}'")
    return client, found


def mlflow_curves(folder: Path, run_id: str) -> Curves:
    """The curves of a run as MLflow's client reads them."""
    client, run = mlflow_run(folder, run_id)
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(metric.step, metric.value) for metric in history] for name, history in histories.items()}


_TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(project,) = SQLiteStorage.get_projects()
runs = {run["id"]: run["name"] for run in SQLiteStorage.get_run_records(project)}
id = sys.argv[1]
names = {name for row in SQLiteStorage.get_logs(project, runs[id], run_id=id) for name in row}
curves = {name: SQLiteStorage.get_metric_values(project, runs[id], name, run_id=id) for name in names}
config = SQLiteStorage.get_run_config(project, runs[id], run_id=id)
print(json.dumps([config, curves]))
"""


def trackio_run(folder: Path, run_id: str) -> tuple[dict, Curves]:
    """The configuration and the curves of a run, as trackio reads its database in a process of its own."""
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackers" / "trackio")}
    command = [sys.executable, "-c", _TRACKIO, run_id]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    config, curves = json.loads(done.stdout)
    points = {name: [(row["step"], row["value"]) for row in rows] for name, rows in curves.items()}
    return config, {name: rows for name, rows in points.items() if name not in ("step", "timestamp")}


def tracker_curves(folder: Path, name: str, run_id: str) -> Curves:
    """The curves of a run in a tracker, without the summary."""
    if name == "trackio":
        curves = trackio_run(folder, run_id)[1]
    else:
        curves = {"wandb": wandb_curves, "mlflow": mlflow_curves}[name](folder, run_id)
    return {metric: points for metric, points in curves.items() if not metric.startswith("summary/")}


def csv_rows(folder: Path, name: str) -> list[dict]:
    """The rows of one of our CSV files."""
    with (folder / "trackers" / "csv" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
