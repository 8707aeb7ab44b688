"""Divides a corpus into independent tasks of about the same number of input bytes.

Files of lines are cut anywhere: a line belongs to the range that contains its first byte, so planning reads nothing.
Other files are cut between units (row groups of Parquet) or not at all; small neighbours share a task. Tasks are
consecutive: their results in order are the corpus in order, for any division.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..formats import FORMATS
from ..inputs.files import STDIN, InputFile

_MAX_TASK_BYTES = 64 << 20
_MIN_TASK_BYTES = 4 << 20
_NUM_TASKS = 64
"""Tasks of a medium corpus, for any number of workers, so that a restart with another number reuses tasks."""

_MIN_TASKS_IN_SHARD = 4
_REPAID_SHARE = 0.35
"""Of tokenizer.json's size. Loading fastokens costs 2.4 s of CPU for the 7 MB of Qwen2.5's, and saves 1.0 s per MB of
text: it pays from 2.5 MB of text."""


@dataclass(frozen=True)
class Span:
    """A part of one input file."""

    file: InputFile
    start: int
    """First byte, or first unit."""
    stop: int
    """End, exclusive, in the same unit."""

    @property
    def num_bytes(self) -> int:
        """Input bytes on disk."""
        if FORMATS[self.file.format].split == "units" and self.file.units:
            return self.file.size * self.stop // self.file.units - self.file.size * self.start // self.file.units
        return self.stop - self.start


@dataclass(frozen=True)
class Task:
    """Consecutive spans for one worker."""

    index: int
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        """Input bytes on disk."""
        return sum(span.num_bytes for span in self.spans)


def choose_task_bytes(files: Sequence[InputFile], num_shards: int = 1) -> int:
    """Return 4 to 64 MB: small tasks end at about the same time, large ones have less overhead.

    With ``num_shards`` it is less if some machines would have no task.
    """
    total = sum(file.size for file in files)
    share = total // max(_NUM_TASKS, _MIN_TASKS_IN_SHARD * num_shards)
    least = min(_MIN_TASK_BYTES, total // (_MIN_TASKS_IN_SHARD * num_shards)) if num_shards > 1 else _MIN_TASK_BYTES
    return max(min(share, _MAX_TASK_BYTES), least, 1)


def are_small(files: Sequence[InputFile], tokenizer: Path | None) -> bool:
    """Return whether the reference tokenizer in this process is faster than workers with the fast one.

    True only for one task of text of known size: not compressed, and not in a format that packs it.

    Args:
        tokenizer: its file; its size determines how long the fast one takes to load. None: text is not tokenized.
    """
    if any(file.compression or not FORMATS[file.format].compressible or file.path == STDIN for file in files):
        return False
    repaid = _MIN_TASK_BYTES if tokenizer is None else tokenizer.stat().st_size * _REPAID_SHARE
    return sum(file.size for file in files) < min(repaid, _MIN_TASK_BYTES)


def plan_tasks(files: Sequence[InputFile], task_bytes: int) -> list[Task]:
    """Cut ``files`` into tasks of about ``task_bytes`` > 0 bytes; only whole files and long lines make larger ones."""
    tasks: list[Task] = []
    spans: list[Span] = []
    room = task_bytes
    for span in _cut(files, task_bytes):
        if spans and span.num_bytes > room:
            tasks.append(Task(len(tasks), tuple(spans)))
            spans, room = [], task_bytes
        spans.append(span)
        room -= span.num_bytes
    if spans:
        tasks.append(Task(len(tasks), tuple(spans)))
    return tasks


def shard_of_tasks(tasks: Sequence[Task], index: int, count: int) -> list[Task]:
    """Return the tasks of shard ``index`` of ``count``: consecutive ones with about its share of the bytes."""
    total = sum(task.num_bytes for task in tasks)
    mine: list[Task] = []
    before = 0
    for task in tasks:
        if before * count // max(total, 1) == index:
            mine.append(task)
        before += task.num_bytes
    return mine


def _cut(files: Sequence[InputFile], task_bytes: int) -> Iterator[Span]:
    for file in files:
        split = "whole" if file.compression else FORMATS[file.format].split
        if split == "bytes":
            for start in range(0, max(file.size, 1), task_bytes):
                yield Span(file, start, min(start + task_bytes, file.size))
        elif split == "units":
            step = max(1, file.units * task_bytes // max(file.size, 1))
            for start in range(0, file.units, step):
                yield Span(file, start, min(start + step, file.units))
        else:
            yield Span(file, 0, file.size)
