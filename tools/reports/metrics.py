"""Read the curves of a run from its ``metrics.jsonl`` (written by engine/observe/metrics_file.py).

A training record has ``step``, ``tokens`` and the values of :data:`COLUMNS`. A record of an evaluation has the name of
the validation set, or of a part of it, ``set/source``, in ``evaluation``, its ``loss``, and the change of the loss
since the start of the run. A value that was not finite is null.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ...engine.errors import UserError
from ...engine.files.regular import open_regular
from ...engine.observe.loss_changes import LossChange, part_of

COLUMNS = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "mfu"),
    *("peak_memory_bytes", "skipped_steps", "steps_without_targets"),
    *("loss_scale", "overflow_steps", "router_aux_loss", "expert_load_max"),
)
SPEED_COLUMNS = ("tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "mfu")
"""Columns that are left out of records with ``profiled``: PyTorch's profiler slows steps down."""


@dataclass(frozen=True)
class Evaluation:
    """The loss of a validation set, in nats per token."""

    step: int
    tokens: int
    loss: float
    change_since_start: float | None = None
    """Change of the loss since the start of the run; None if that is unknown."""

    @property
    def perplexity(self) -> float:
        """Return the perplexity, as the trainer records it."""
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, float]:
        """Return the known values, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class EvaluationChange:
    """The loss of a validation set at the start of the run, or else its first one, and its last one."""

    before: Evaluation
    after: Evaluation

    @property
    def losses(self) -> LossChange:
        """Return the losses alone."""
        return LossChange(self.before.loss, self.after.loss)


_ByStep = dict[int, Evaluation]


@dataclass
class Curves:
    """The contents of a metrics file in order of steps. If a step occurs twice, the later record counts."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    """A value for each of ``steps``; NaN if the record has none."""
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    """By name: validation sets in their order, each followed by its parts, ``set/source``."""
    is_cut_off: bool = False
    """Whether the last line is incomplete, because the run is writing it or was killed."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return ``(tokens, value)`` of a column, finite values only."""
        values = zip(self.tokens, self.columns[name], strict=True)
        return [(tokens, value) for tokens, value in values if math.isfinite(value)]

    @property
    def sets(self) -> list[str]:
        """Return the names of the validation sets, without their parts."""
        return [name for name in self.evaluations if part_of(name, self.evaluations) is None]

    def changes(self) -> dict[str, EvaluationChange]:
        """Return start and end of each evaluation with more than one loss."""
        found = {name: _start_of(ones) for name, ones in self.evaluations.items()}
        return {
            name: EvaluationChange(start, self.evaluations[name][-1])
            for name, start in found.items()
            if start is not self.evaluations[name][-1]
        }


def _start_of(found: list[Evaluation]) -> Evaluation:
    """Return the loss at the start of the run: of the first record, or, if a resumed run has none, by its change."""
    first, last = found[0], found[-1]
    if first.step == 0 or last.change_since_start is None:
        return first
    return Evaluation(0, 0, last.loss - last.change_since_start)


def read_curves(path: Path) -> Curves:
    """Read a metrics file, one line at a time.

    Raises:
        UserError: the file cannot be read, or a line (named by its number) is damaged.
    """
    training: dict[int, tuple[int, array[float]]] = {}
    evaluations: dict[str, _ByStep] = {}
    is_cut_off = False
    for number, line in _lines(path):
        try:
            _add(training, evaluations, _record(line))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            if not line.endswith(b"\n"):
                is_cut_off = True
                break
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path}:{number}: not a record of a run ({what}); remove the line, or restore the file"
            ) from None
    rows = [(step, *training[step]) for step in sorted(training)]
    return Curves(
        steps=array("q", (step for step, _, _ in rows)),
        tokens=array("q", (tokens for _, tokens, _ in rows)),
        columns={name: array("d", (row[place] for _, _, row in rows)) for place, name in enumerate(COLUMNS)},
        evaluations={name: [found[step] for step in sorted(found)] for name, found in _grouped(evaluations)},
        is_cut_off=is_cut_off,
    )


def _grouped(evaluations: dict[str, _ByStep]) -> list[tuple[str, _ByStep]]:
    """Return the evaluations with the parts of each set after it."""
    places = {name: place for place, name in enumerate(evaluations)}
    return sorted(evaluations.items(), key=lambda one: places[part_of(one[0], places) or one[0]])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open_regular(path) as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = json.loads(line.decode())  # accepts NaN, which earlier versions wrote, and has better error messages
    if not isinstance(record, dict):
        raise TypeError("not a JSON object")
    return record


def _add(
    training: dict[int, tuple[int, array[float]]],
    evaluations: dict[str, _ByStep],
    record: dict[str, Any],
) -> None:
    step, tokens = record["step"], record["tokens"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (step, tokens)):
        raise TypeError("step or tokens is not a whole number >= 0")
    if "evaluation" in record:
        change = record.get("change_since_start")
        found = Evaluation(step, tokens, _number(record["loss"]), None if change is None else _number(change))
        evaluations.setdefault(str(record["evaluation"]), {})[step] = found
    else:
        left_out = SPEED_COLUMNS if record.get("profiled") else ()
        values = [math.nan if name in left_out else _number(record.get(name)) for name in COLUMNS]
        training[step] = tokens, array("d", values)


def _number(value: Any) -> float:
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.40} is not a number")
    return math.nan if value is None else float(value)
