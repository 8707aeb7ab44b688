"""Prepare ``metrics.jsonl`` and ``samples.jsonl`` when a run starts, so that they always hold one curve.

Records are renamed, never deleted. A resumed run repeats the steps after its checkpoint; their records move to
``metrics.{last step}.jsonl``. A run that starts over moves the whole file and the TensorBoard events.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files.atomic import replace_file

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_TAIL_BYTES = 1 << 20
"""Number of bytes at the end of the file in which the last record is searched."""


def last_record(run_folder: Path) -> dict[str, Any] | None:
    """Return the last complete record of a run, or None.

    Raises:
        OSError: ``metrics.jsonl`` exists and cannot be read.
    """
    path = run_folder / METRICS_FILE
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((record for record in map(_record, reversed(lines)) if record is not None), None)


def read_metrics(run_folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield the records up to ``step``; none if there is no file."""
    path = run_folder / METRICS_FILE
    if path.exists():
        with path.open("rb") as file:
            yield from (record for record in map(_record, file) if record is not None and record["step"] <= step)


def truncate_records(run_folder: Path, name: str, step: int, evaluates_again: bool) -> list[str]:
    """Keep the records up to ``step`` in a file, and move later ones to another file.

    Args:
        run_folder: of the run.
        name: of the file: ``metrics.jsonl`` or ``samples.jsonl``.
        step: of the checkpoint that the run continues from.
        evaluates_again: whether the run repeats the evaluations of ``step``: then their records move as well.

    Returns:
        lines for the log.
    """
    path = run_folder / name
    if not path.exists():
        return []
    kept, others, last = [], [], None
    for line in path.read_bytes().splitlines(keepends=True):
        record = _record(line)
        if record is None and not line.endswith(b"\n"):
            continue  # the record that a killed run was writing
        of_evaluation = name == SAMPLES_FILE or (record is not None and "evaluation" in record)
        again = record is not None and evaluates_again and record["step"] == step and of_evaluation
        if record is not None and record["step"] <= step and not again:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        else:
            others.append(line)
            last = max(record["step"], last or 0) if record is not None else last
    lines = []
    if others:
        target = _free_name(run_folder, _named(path.stem, last, path.suffix))
        replace_file(target, others)
        lines.append(f"records     {len(others):,} of {name} after step {step:,} moved to {target}")
    replace_file(path, kept)
    return lines


def archive_metrics(run_folder: Path, names: tuple[str, ...] = ()) -> list[str]:
    """Rename the records of an earlier run in the same folder.

    Args:
        run_folder: of the run.
        names: other files of that run, renamed with the records.

    Returns:
        lines for the log.
    """
    last = last_record(run_folder)
    step = last["step"] if last else None
    lines: list[str] = []
    for name in (METRICS_FILE, SAMPLES_FILE, TENSORBOARD_FOLDER, *names):
        path = run_folder / name
        if not _holds_something(path) or (name in names and not lines):
            continue
        target = _free_name(run_folder, _named(path.stem, step, path.suffix))
        path.rename(target)
        lines.append(f"records     {path} of an earlier run renamed to {target.name}")
    return lines


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _named(stem: str, step: int | None, suffix: str) -> Callable[[int], str]:
    middle = "unreadable" if step is None else str(step)
    return lambda number: f"{stem}.{middle}{f'-{number}' if number > 1 else ''}{suffix}"


def _free_name(folder: Path, name: Callable[[int], str]) -> Path:
    number = 1
    while os.path.lexists(folder / name(number)):
        number += 1
    return folder / name(number)
