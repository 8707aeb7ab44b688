"""Read the curves of a run from its ``metrics.jsonl`` (written by engine/observe/metrics_file.py).

A training record has ``step``, ``tokens`` and the values of :data:`COLUMNS`. A record of an evaluation has the name of
the validation set in ``evaluation``, and its ``loss``. A value that was not finite is null.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ...engine.errors import UserError
from ...engine.files.regular import open_regular

COLUMNS = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "mfu"),
    *("peak_memory_bytes", "skipped_steps", "steps_without_targets"),
)
SPEED_COLUMNS = ("tokens_per_second", "tokens_per_second_per_rank", "step_seconds", "mfu")
"""Columns that are left out of records with ``profiled``: PyTorch's profiler slows steps down."""
UNCHANGED = 0.0005
"""Smaller changes of a loss, in nats, count as no change: they print as 0.000."""


@dataclass(frozen=True)
class Evaluation:
    """The loss of a validation set, in nats per token."""

    step: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """Return the perplexity, as the trainer records it."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class LossChange:
    """First and last loss of a validation set."""

    before: Evaluation
    after: Evaluation

    @property
    def change(self) -> float:
        """Return the change in nats."""
        return self.after.loss - self.before.loss

    @property
    def percent(self) -> float:
        """Return the change in percent of the loss before."""
        return 100 * self.change / self.before.loss if self.before.loss else math.nan

    @property
    def perplexity_percent(self) -> float:
        """Return the change of the perplexity in percent."""
        return 100 * math.expm1(min(self.change, 700.0))


@dataclass
class Curves:
    """The contents of a metrics file in order of steps. If a step occurs twice, the later record counts."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    """A value for each of ``steps``; NaN if the record has none."""
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    """By validation set, the first one first."""
    is_cut_off: bool = False
    """Whether the last line is incomplete, because the run is writing it or was killed."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return ``(tokens, value)`` of a column, finite values only."""
        values = zip(self.tokens, self.columns[name], strict=True)
        return [(tokens, value) for tokens, value in values if math.isfinite(value)]

    def changes(self) -> dict[str, LossChange]:
        """Return first and last evaluation of each validation set with at least two."""
        return {name: LossChange(found[0], found[-1]) for name, found in self.evaluations.items() if len(found) > 1}


def read_curves(path: Path) -> Curves:
    """Read a metrics file, one line at a time.

    Raises:
        UserError: the file cannot be read, or a line (named by its number) is damaged.
    """
    training: dict[int, tuple[int, array[float]]] = {}
    evaluations: dict[str, dict[int, Evaluation]] = {}
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
        evaluations={name: [found[step] for step in sorted(found)] for name, found in evaluations.items()},
        is_cut_off=is_cut_off,
    )


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
    evaluations: dict[str, dict[int, Evaluation]],
    record: dict[str, Any],
) -> None:
    step, tokens = record["step"], record["tokens"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (step, tokens)):
        raise TypeError("step or tokens is not a whole number >= 0")
    if "evaluation" in record:
        found = Evaluation(step, tokens, _number(record["loss"]))
        evaluations.setdefault(str(record["evaluation"]), {})[step] = found
    else:
        left_out = SPEED_COLUMNS if record.get("profiled") else ()
        values = [math.nan if name in left_out else _number(record.get(name)) for name in COLUMNS]
        training[step] = tokens, array("d", values)


def _number(value: Any) -> float:
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.40} is not a number")
    return math.nan if value is None else float(value)
