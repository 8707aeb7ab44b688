"""Read a run folder into one dataclass, without PyTorch.

The run may still be training, or may have been killed. Missing or incomplete files give remarks; only a folder without
a curve, or a damaged line of the curve, is an error.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...engine.config.budget import recorded_budget
from ...engine.config.files import read_config
from ...engine.data.curriculum import Curriculum
from ...engine.errors import UserError
from ...engine.files.regular import open_regular, read_regular
from ...engine.guards.rank_consistency import flatten
from ...engine.observe.console import LOG_FILE
from ...engine.observe.curves import METRICS_FILE, SAMPLES_FILE
from ...engine.weights.checkpoint.manifest import MANIFEST_FILE, Manifest
from ...engine.weights.checkpoint.run_record import CONFIG_FILE
from ..checkpoint_report.listing import Row, list_checkpoints
from .metrics import Curves, read_curves
from .models import ModelFolder, read_model_folders

_MOVED = re.compile(r"records +[\d,]+ of metrics\.jsonl after step ([\d,]+) moved to .*?([^/]+)$")
_LOGGED = re.compile(r"\S+ \S+ (model|ranks|blocks|attention) +(.*)")
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Exceptions that a file with unexpected content may raise."""


@dataclass(frozen=True)
class Restart:
    """A point at which the run continued from a checkpoint and repeated some steps."""

    kind: str
    """``resumed``, or ``rewound`` to before a loss spike."""
    step: int
    """Step of the checkpoint."""
    tokens: int
    lost_step: int
    """Last step whose record was discarded."""
    lost_tokens: int
    file: str
    """File that holds the discarded records."""


@dataclass(frozen=True)
class DataSource:
    """A training source of the run."""

    name: str
    path: str
    weights: list[float | None]
    """Weight in each stage; None if the stage does not use the source."""
    tokens: int | None = None
    """Tokens of the dataset. None, here and below, before the first checkpoint."""
    trained_tokens: int | None = None
    """Tokens used up to the newest checkpoint."""
    fingerprint: str = ""
    """Content hash of its tokens; empty without a sidecar."""

    @property
    def epochs(self) -> float | None:
        """Return the epochs up to the newest checkpoint."""
        return self.trained_tokens / self.tokens if self.tokens and self.trained_tokens is not None else None


@dataclass(frozen=True)
class GeneratedSample:
    """A prompt, and its first and last continuation, without the prompt."""

    prompt: str
    before: str
    after: str
    before_step: int | None = None
    """Step of the first continuation; None in files of earlier versions, which had no steps."""
    after_step: int | None = None


@dataclass(frozen=True)
class RecordedRun:
    """The contents of a run folder."""

    folder: str
    curves: Curves
    last_record: str
    """Time of the newest record, in UTC."""
    configuration: str = ""
    """Text of ``config.yaml``."""
    config: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, str] = field(default_factory=dict)
    """Lines that the newest start logged about model, ranks, blocks and attention."""
    train_tokens: int | None = None
    """The token budget; None if it is not known."""
    stopped_early: bool = False
    """Whether the newest checkpoint is that of an early stop, and nothing was trained after it."""
    starts: int | None = None
    """Number of starts; None without a log."""
    restarts: list[Restart] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    models: list[ModelFolder] = field(default_factory=list)
    """``final_model`` and ``best_model``, as far as they are written."""
    sources: list[DataSource] = field(default_factory=list)
    validation: dict[str, str] = field(default_factory=dict)
    """Datasets by name of the validation set."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and layout of the newest checkpoint."""
    samples: list[GeneratedSample] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Incomplete records, skipped steps, and missing or damaged files."""

    @property
    def step(self) -> int:
        """Return the last recorded step."""
        return self.curves.steps[-1]

    @property
    def tokens(self) -> int:
        """Return the tokens up to the last recorded step."""
        return self.curves.tokens[-1]

    @property
    def is_finished(self) -> bool:
        """Return whether the token budget is used up, or the run has stopped early."""
        return self.stopped_early or (self.train_tokens is not None and self.tokens >= self.train_tokens)

    def median(self, column: str) -> float | None:
        """Return the median of a column; None without values."""
        values = [value for _, value in self.curves.points(column)]
        return median(values) if values else None

    def maximum(self, column: str) -> float | None:
        """Return the largest value of a column; None without values."""
        return max((value for _, value in self.curves.points(column)), default=None)

    @property
    def final_loss(self) -> float | None:
        """Return the mean training loss of the last 5 % of the records, at least ten of them."""
        losses = [value for _, value in self.curves.points("loss")]
        return fmean(losses[-max(10, len(losses) // 20) :]) if losses else None

    @property
    def seconds_in_steps(self) -> float:
        """Return the time spent in steps, from the mean step time in each record."""
        steps = [self.curves.steps[0] - 1, *self.curves.steps]  # it may continue another run
        seconds = zip(steps, steps[1:], self.curves.columns["step_seconds"], strict=False)
        return math.fsum((step - before) * each for before, step, each in seconds if math.isfinite(each))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single records as plain values for JSON."""
        rows = [replace(row, manifest=None) for row in self.checkpoints]
        record = asdict(replace(self, curves=Curves(), checkpoints=rows))
        del record["curves"], record["configuration"]
        summary = {name: getattr(self, name) for name in ("step", "tokens", "is_finished")}
        return record | summary | {
            "seconds_in_steps": self.seconds_in_steps,
            "final_loss": self.final_loss,
            "median": {name: self.median(name) for name in ("tokens_per_second", "step_seconds", "mfu")},
            "peak_memory_bytes": self.maximum("peak_memory_bytes"),
            "evaluations": {name: [one.to_dict() for one in found] for name, found in self.curves.evaluations.items()},
            "changes": {name: change.losses.to_dict() for name, change in self.curves.changes().items()},
        }  # fmt: skip


def read_run(folder: Path) -> RecordedRun:
    """Read the run folder ``folder``.

    Raises:
        UserError: it is not a run folder, holds no record of a step, or a line of its curve is damaged.
    """
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the run_folder of a run")
    if not path.exists():
        where = f", here {folder.absolute().parents[1]}" if (folder / MANIFEST_FILE).is_file() else ""
        raise UserError(f"{folder}: not a run folder, it holds no {METRICS_FILE}; name the run_folder of a run{where}")
    curves = read_curves(path)
    if not curves.steps:
        raise UserError(f"{path}: no step is recorded yet; the run writes its first record after its first step")
    remarks = list(_curve_remarks(curves))
    config, text = _read_config(folder / CONFIG_FILE, remarks)
    log = _read_log(folder / LOG_FILE)
    checkpoints, newest = _read_checkpoints(folder, curves, remarks)
    budget = _budget(config, newest)
    written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return RecordedRun(
        folder=str(folder),
        curves=curves,
        last_record=f"{written:%Y-%m-%d %H:%M:%S} UTC",
        configuration=text,
        config=config,
        train_tokens=budget,
        stopped_early=_stopped_early(config, newest, curves.tokens[-1], budget),
        logged=log.lines,
        starts=log.starts or None,
        restarts=list(_restarts(folder, curves, log, config, remarks)),
        checkpoints=checkpoints,
        models=list(read_model_folders(folder, curves, remarks)),
        sources=_sources(newest, config, remarks),
        validation={
            name: str(one.get("path") if isinstance(one, dict) else one)
            for name, one in _section(_section(config, "data"), "validation").items()
        },
        environment=_environment(newest),
        samples=_samples(folder / SAMPLES_FILE, remarks),
        remarks=remarks,
    )


def differences(one: RecordedRun, other: RecordedRun) -> dict[str, tuple[str, str]]:
    """Return the differences of two runs by key, as JSON: settings, content of the data, versions."""

    def facts(run: RecordedRun) -> dict[str, str]:
        hashes = {f"content of {source.name}": source.fingerprint for source in run.sources if source.fingerprint}
        return flatten({**run.config, "run_folder": None, **hashes, **run.environment})

    here, there = facts(one), facts(other)
    keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    return {key: (here.get(key, "absent"), there.get(key, "absent")) for key in keys}


def _section(config: Any, name: str) -> dict[str, Any]:
    section = config.get(name) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}


def _budget(config: dict[str, Any], newest: Manifest | None) -> int | None:
    try:
        return recorded_budget(_section(config, "training"), _section(newest.config, "training") if newest else None)
    except (KeyError, TypeError):  # a configuration that was edited
        return None


def _stopped_early(config: dict[str, Any], newest: Manifest | None, tokens: int, budget: int | None) -> bool:
    if newest is None or not newest.early_stopping or tokens > newest.consumed_tokens or tokens >= (budget or math.inf):
        return False
    patience = _section(_section(config, "training"), "early_stopping").get("patience")
    return type(patience) is int and newest.early_stopping["evaluations"] >= patience


def _curve_remarks(curves: Curves) -> Iterator[str]:
    if curves.is_cut_off:
        yield f"the last line of {METRICS_FILE} is incomplete and left out: the run is writing it, or was killed"
    for name, what in (
        ("skipped_steps", "skipped because of a non-finite or spiking loss or gradient"),
        ("steps_without_targets", "without a token to predict"),
        (
            "overflow_steps",
            "skipped because fp16 gradients overflowed, which is normal while the loss scale is searched",
        ),
    ):
        count = next((value for _, value in reversed(curves.points(name))), 0)
        if count:
            yield f"{count:,.0f} steps were {what}"


def _read_config(path: Path, remarks: list[str]) -> tuple[dict[str, Any], str]:
    try:
        return read_config(path), path.read_text(encoding="utf-8-sig")
    except UserError as error:
        remarks.append(f"the configuration is not shown: {str(error).removeprefix('--config ')}")
        return {}, ""


@dataclass
class _Log:
    """Facts in ``log.txt`` since the run last started from the beginning."""

    lines: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    moved: dict[str, tuple[str, int]] = field(default_factory=dict)
    """File of discarded records -> (kind of restart, step that the run continued from)."""


def _read_log(path: Path) -> _Log:
    log, kind = _Log(), "resumed"
    try:
        with open_regular(path) as file:
            for line in file:
                text = line.decode("utf-8", "replace").rstrip()
                if found := _LOGGED.fullmatch(text):
                    log.lines[found[1]] = found[2]
                    log.starts += found[1] == "model"
                    kind = "resumed"
                elif found := _MOVED.search(text):
                    log.moved[found[2]] = (kind, int(found[1].replace(",", "")))
                elif " of an earlier run renamed to metrics." in text:
                    log = _Log()
                elif " rewound to step " in text:
                    kind = "rewound"
    except OSError:
        pass  # the log is optional; all numbers are in other files
    return log


def _restarts(folder: Path, curves: Curves, log: _Log, config: dict[str, Any], remarks: list[str]) -> Iterator[Restart]:
    """Yield the restarts that discarded records, those in the log first."""
    others = sorted(path.name for path in folder.glob("metrics.*.jsonl") if path.name not in log.moved)
    interval = _section(config, "logging").get("log_interval")
    interval = interval if type(interval) is int and interval > 0 else 1
    for name in [*log.moved, *others]:
        try:
            lost = read_curves(folder / name)
        except UserError as error:
            remarks.append(f"not shown: {error}")
            continue
        before = curves.steps[: bisect_left(curves.steps, lost.steps[0])] if lost.steps else ()
        if lost.steps and (before or name in log.moved):
            # The first step after a start is always recorded, by both curves or only by the later one.
            step = before[-1] - 1 if before and before[-1] % interval else lost.steps[0] - 1
            kind, step = log.moved.get(name, ("resumed", step))
            yield Restart(kind, step, _tokens_at(curves, step), lost.steps[-1], lost.tokens[-1], name)
        elif lost.steps:
            remarks.append(f"{name} is the curve of an earlier run in this folder")


def _tokens_at(curves: Curves, step: int) -> int:
    """Return the tokens after ``step``, interpolated between records."""
    after = bisect_left(curves.steps, step)
    if after == len(curves.steps):
        return curves.tokens[-1]
    start_step, start = (curves.steps[after - 1], curves.tokens[after - 1]) if after else (0, 0)
    share = (step - start_step) / max(1, curves.steps[after] - start_step)
    return round(start + share * (curves.tokens[after] - start))


def _read_checkpoints(folder: Path, curves: Curves, remarks: list[str]) -> tuple[list[Row], Manifest | None]:
    """Return all checkpoints by step, and the manifest of the newest complete one."""
    if not (folder / "checkpoints").is_dir():
        remarks.append(f"{folder / 'checkpoints'} does not exist: there is no checkpoint yet, or its disk is missing")
        return [], None
    try:
        rows = list_checkpoints(folder, dict(zip(curves.steps, curves.columns["loss"], strict=True)))
    except (UserError, OSError) as error:  # for example, the run is removing one
        remarks.append(f"checkpoints are not shown: {getattr(error, 'strerror', None) or error}")
        return [], None
    whole = [row.manifest for row in rows if row.manifest and row.state.startswith("complete")]
    return rows, max(whole, key=lambda manifest: manifest.step, default=None)


def _sources(manifest: Manifest | None, config: dict[str, Any], remarks: list[str]) -> list[DataSource]:
    """Return the training sources, from the newest checkpoint or else from the configuration."""
    try:
        return list(_trained_sources(manifest) if manifest else _configured_sources(_section(config, "data")))
    except _BROKEN as error:
        remarks.append(f"the training data is not shown: {CONFIG_FILE}: {error!r:.100}")
        return []


def _configured_sources(data: dict[str, Any]) -> Iterator[DataSource]:
    stages = [stage["train"] for stage in data.get("stages") or []] or [data.get("train") or []]
    mixtures = [{str(one.get("name") or one["path"]): one for one in mixture} for mixture in stages]
    for name, one in {name: one for mixture in mixtures for name, one in mixture.items()}.items():
        weights = [float(mixture[name].get("weight", 1.0)) if name in mixture else None for mixture in mixtures]
        yield DataSource(name, str(one["path"]), weights)


def _trained_sources(manifest: Manifest) -> Iterator[DataSource]:
    curriculum = Curriculum.from_state(manifest.sample_order)
    given, length = curriculum.cursors(manifest.consumed_samples), manifest.config["training"]["sequence_length"]
    mixtures = [{source.name: source.weight for source in stage.sources} for stage in curriculum.stages]
    for name, facts in manifest.datasets.items():
        weights, trained = [mixture.get(name) for mixture in mixtures], given.get(name, 0) * length
        yield DataSource(name, str(facts["path"]), weights, facts["tokens"], trained, facts["hash"] or "")


def _environment(manifest: Manifest | None) -> dict[str, str]:
    if manifest is None:
        return {}
    layout = ", ".join(f"{axis} {ranks}" for axis, ranks in manifest.layout.items() if ranks > 1)
    ranks = f"{manifest.world_size}" + (f" ({layout})" if layout else "")
    return {"ranks": ranks, "retemper": manifest.retemper_version, **manifest.versions}


def _samples(path: Path, remarks: list[str]) -> list[GeneratedSample]:
    """Return the texts of ``samples.jsonl``, if it exists."""
    found: dict[str, GeneratedSample] = {}
    try:
        lines = read_regular(path).splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                sample = _sample(json.loads(line))
            except _BROKEN as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"line {number}: {error}") from None
                continue  # the run is writing it, or was killed
            first = found.get(sample.prompt, sample)
            found[sample.prompt] = replace(sample, before=first.before, before_step=first.before_step)
    except FileNotFoundError:
        return []
    except _BROKEN as error:
        remarks.append(f"samples are not shown: {path}: {error}")
        return []
    return list(found.values())


def _sample(record: dict[str, Any]) -> GeneratedSample:
    """Return the sample of a record, which has one text and its step, or in earlier versions two texts."""
    if "before" in record:
        return GeneratedSample(str(record["prompt"]), str(record["before"]), str(record["after"]))
    text, step = str(record["text"]), int(record["step"])
    return GeneratedSample(str(record["prompt"]), text, text, step, step)
