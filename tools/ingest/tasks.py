"""Cutting a corpus into tasks that workers do independently, each of about the same number of input bytes.

Plain JSONL is cut anywhere: a line belongs to the range in which its first byte lies, so planning reads nothing.
Compressed and text files are whole; small neighbours share a task. Tasks are consecutive: their results in order are
the corpus in order, however they were cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .inputs import Format, InputFile

_MAX_TASK_BYTES = 32 << 20
_MIN_TASK_BYTES = 1 << 20
_TASKS_PER_WORKER = 8


@dataclass(frozen=True)
class Span:
    """The bytes [start, stop) of one input file."""

    source: int
    """Index of the file in the list of inputs."""
    path: str
    format: Format
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """Consecutive spans, done by one worker."""

    index: int
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        """Input bytes on disk."""
        return sum(span.stop - span.start for span in self.spans)


def choose_task_bytes(files: Sequence[InputFile], workers: int) -> int:
    """Small enough for all workers to finish at about the same time, large enough to cost nothing: 1 to 32 MB."""
    share = sum(file.size for file in files) // (workers * _TASKS_PER_WORKER)
    return min(max(share, _MIN_TASK_BYTES), _MAX_TASK_BYTES)


def plan_tasks(files: Sequence[InputFile], task_bytes: int) -> list[Task]:
    """Cut ``files`` into tasks of about ``task_bytes`` > 0 bytes; only whole files and long lines make larger ones."""
    tasks: list[Task] = []
    spans: list[Span] = []
    room = task_bytes
    for span in _cut(files, task_bytes):
        size = span.stop - span.start
        if spans and size > room:
            tasks.append(Task(len(tasks), tuple(spans)))
            spans, room = [], task_bytes
        spans.append(span)
        room -= size
    if spans:
        tasks.append(Task(len(tasks), tuple(spans)))
    return tasks


def _cut(files: Sequence[InputFile], task_bytes: int) -> Iterator[Span]:
    for source, file in enumerate(files):
        step = task_bytes if file.format is Format.JSONL else max(file.size, 1)
        for start in range(0, max(file.size, 1), step):
            yield Span(source, file.path, file.format, start, min(start + step, file.size))
