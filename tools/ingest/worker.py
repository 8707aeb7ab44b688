"""What a worker process does: one task -> one shard of tokens and its documents' lengths.

A shard is two files in the run's scratch folder, ``{task}.bin`` (tokens) and ``{task}.npy`` (int64 lengths).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ...engine.data.tokenizer import TokenizerHandle
from .readers import SpanTally, read_texts
from .tasks import Task

BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker needs to know about the run."""

    tokenizer_name: str
    tokenizer_file: Path
    eod_token: str | None
    """Appended to each document; None: nothing is."""
    dtype: str
    json_key: str
    skip_bad_lines: bool
    scratch: Path
    """Folder for the shards."""
    threads: int
    """Encoding threads in this worker."""
    batch_characters: int = BATCH_CHARACTERS
    """Text encoded at once: large enough to keep the threads busy, small enough to bound memory to some 100 MB."""


@dataclass
class TaskResult:
    """One shard, and what went into it."""

    index: int
    tallies: list[SpanTally]
    """One for each span of the task."""
    tokens: int = 0
    characters: int = 0
    """Code points of the kept documents."""
    text_bytes: int = 0
    """Bytes of the kept documents in UTF-8."""


def shard_paths(scratch: Path, index: int) -> tuple[Path, Path]:
    """Tokens file and lengths file of task ``index``."""
    return scratch / f"{index}.bin", scratch / f"{index}.npy"


class TaskRunner:
    """Runs tasks in this process.

    Args:
        progress: int64 [2 x tasks], shared: input bytes read and tokens written by each task. Only the worker that
            runs a task writes its two entries, so no lock is held that a killed worker could leave locked.
    """

    def __init__(self, settings: WorkerSettings, progress: Any) -> None:
        self._settings = settings
        self._progress = progress
        self._tokenizer = TokenizerHandle(settings.tokenizer_name, settings.tokenizer_file)
        self._eod_id = None if settings.eod_token is None else self._tokenizer.eod(settings.eod_token)[1]

    def run(self, task: Task) -> TaskResult:
        """Tokenize ``task`` to its shard.

        Raises:
            UserError: from reading its files.
        """
        result = TaskResult(task.index, [SpanTally() for _ in task.spans])
        bin_path, lengths_path = shard_paths(self._settings.scratch, task.index)
        lengths = [np.empty(0, np.int64)]
        with open(bin_path, "wb") as shard:
            for texts, owners in self._batches(task, result.tallies):
                lengths.append(self._encode(texts, owners, result, shard))
                self._progress[2 * task.index] = sum(tally.consumed for tally in result.tallies)
                self._progress[2 * task.index + 1] = result.tokens
        np.save(lengths_path, np.concatenate(lengths))
        self._progress[2 * task.index] = task.num_bytes
        return result

    def _batches(self, task: Task, tallies: list[SpanTally]) -> Iterator[tuple[list[str], list[int]]]:
        """Texts of the task in batches, and for each text the index of its span."""
        texts: list[str] = []
        owners: list[int] = []
        room = self._settings.batch_characters
        for owner, (span, tally) in enumerate(zip(task.spans, tallies, strict=True)):
            for text in read_texts(span, self._settings.json_key, self._settings.skip_bad_lines, tally):
                texts.append(text)
                owners.append(owner)
                room -= len(text) + 1  # + 1 so that empty texts fill a batch too
                if room <= 0:
                    yield texts, owners
                    texts, owners, room = [], [], self._settings.batch_characters
        if texts:
            yield texts, owners

    def _encode(
        self, texts: list[str], owners: list[int], result: TaskResult, shard: IO[bytes]
    ) -> npt.NDArray[np.int64]:
        """Write the tokens of ``texts``; return the lengths of those that have any, and count all of it."""
        ids, lengths = self._tokenizer.encode_flat(texts)
        for text, owner, length in zip(texts, owners, lengths.tolist(), strict=True):
            if length == 0:
                result.tallies[owner].empty_documents += 1
                continue
            result.tallies[owner].documents += 1
            result.characters += len(text)
            result.text_bytes += len(text.encode("utf-8"))
        lengths = lengths[lengths > 0]
        if self._eod_id is not None:
            ids = np.insert(ids, np.cumsum(lengths), self._eod_id)
            lengths = lengths + 1
        shard.write(ids.astype(self._settings.dtype).tobytes())
        result.tokens += len(ids)
        return lengths


_runner: TaskRunner | None = None


def start_worker(settings: WorkerSettings, progress: Any) -> None:
    """Make this process a worker."""
    # Ctrl-C reaches the whole process group; the parent decides, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # Read by the tokenizers library when it first encodes. Workers x threads is the number of cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if settings.threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(settings.threads)
    global _runner
    _runner = TaskRunner(settings, progress)


def run_task(task: Task) -> TaskResult:
    """Run ``task`` in a process that :func:`start_worker` has prepared."""
    assert _runner is not None
    return _runner.run(task)


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
