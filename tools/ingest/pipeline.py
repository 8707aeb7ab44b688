"""Text files -> an indexed dataset: plan, tokenize in parallel, merge in order, publish.

    inputs.py    which files, in which order
    tasks.py     cut into tasks of 1 to 32 MB
    pool.py      worker processes, results in order
    worker.py    task -> shard: readers.py gives texts, the tokenizer gives ids
    pipeline.py  shards -> one dataset (engine/data/indexed_dataset.py), sidecar, report

The dataset's bytes depend on the input, the tokenizer and the options that concern documents, and not on the number of
workers or the size of tasks. Nothing stands under a final name before all of it is complete.
"""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.data.indexed_dataset import (
    IndexedDatasetWriter,
    best_dtype,
    dataset_prefix,
    refuse_existing_outputs,
)
from ...engine.data.sidecar import Sidecar, Source
from ...engine.data.tokenizer import TokenizerHandle, load_tokenizer
from ...engine.errors import UserError
from .inputs import InputFile, expand_inputs
from .pool import run_in_order, usable_cores, worker_context
from .progress import ProgressReport
from .readers import SpanTally
from .tasks import Task, choose_task_bytes, plan_tasks
from .worker import BATCH_CHARACTERS, TaskResult, WorkerSettings, shard_paths


@dataclass(frozen=True)
class PreprocessOptions:
    """What the command was asked to do; the fields are its flags."""

    input: Sequence[str]
    tokenizer: str
    output_prefix: str = "dataset"
    json_key: str = "text"
    append_eod: bool = True
    eod_token: str | None = None
    """None: the tokenizer's document end."""
    workers: int | None = None
    """None: the usable cores."""
    overwrite: bool = False
    skip_bad_lines: bool = False
    task_bytes: int | None = None
    """Input bytes in a task; None: by the corpus and the workers. No flag."""
    batch_characters: int = BATCH_CHARACTERS
    """Text encoded at once; no flag."""


@dataclass(frozen=True)
class PreprocessReport:
    """What was done."""

    sidecar: Sidecar
    first_skipped: str | None
    """``file:line: reason`` of the first line that was skipped."""
    seconds: float
    files: tuple[str, ...]
    """The files written."""


@dataclass
class _Totals:
    """Sums over the tasks so far."""

    tallies: list[SpanTally]
    """One for each input file."""
    characters: int = 0
    text_bytes: int = 0
    first_skipped: str | None = None

    def add(self, task: Task, result: TaskResult) -> None:
        self.characters += result.characters
        self.text_bytes += result.text_bytes
        for span, tally in zip(task.spans, result.tallies, strict=True):
            total = self.tallies[span.source]
            total.documents += tally.documents
            total.empty_documents += tally.empty_documents
            total.skipped_lines += tally.skipped_lines
            if self.first_skipped is None and tally.first_skipped is not None:
                self.first_skipped = tally.first_skipped.describe()


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Tokenize a corpus to ``{output_prefix}.bin``, ``.idx`` and ``.json``.

    Raises:
        UserError: wrong options, input or tokenizer, no token in the input, the output exists or cannot be written, a
            worker was killed. Nothing is left behind, and an existing dataset is as it was.
    """
    started = time.monotonic()
    prefix = _checked_prefix(options)
    files = expand_inputs(options.input)
    tokenizer = load_tokenizer(options.tokenizer)
    eod = _document_end(tokenizer, options)
    workers = options.workers or usable_cores()
    tasks = plan_tasks(files, options.task_bytes or choose_task_bytes(files, workers))
    workers = min(workers, len(tasks))
    dtype = best_dtype(tokenizer.vocab_size)
    totals = _Totals([SpanTally() for _ in files])
    _say_start(files, tokenizer, eod, options, workers)
    try:
        with IndexedDatasetWriter(prefix, dtype, overwrite=options.overwrite) as writer:
            settings = WorkerSettings(
                tokenizer_name=tokenizer.name,
                tokenizer_file=tokenizer.file,
                eod_token=eod[0] if eod and options.append_eod else None,
                dtype=dtype.str,
                json_key=options.json_key,
                skip_bad_lines=options.skip_bad_lines,
                scratch=writer.scratch,
                threads=max(usable_cores() // workers, 1),
                batch_characters=options.batch_characters,
            )
            _tokenize(tasks, workers, settings, writer, totals)
            if writer.num_tokens == 0:
                raise UserError(_nothing_found(options, totals))
            writer.sidecar = _sidecar(files, tokenizer, eod, options, totals)
    except OSError as error:
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}; nothing was written") from error
    sidecar = Sidecar.read(prefix)
    assert sidecar is not None
    written = tuple(f"{prefix}{end}" for end in (".bin", ".idx", ".json"))
    return PreprocessReport(sidecar, totals.first_skipped, time.monotonic() - started, written)


def _tokenize(
    tasks: Sequence[Task], workers: int, settings: WorkerSettings, writer: IndexedDatasetWriter, totals: _Totals
) -> None:
    """Run the tasks and append their shards to the dataset, each as soon as those before it are done."""
    counters = worker_context().RawArray("q", 2 * len(tasks))
    with (
        ProgressReport(counters, sum(task.num_bytes for task in tasks)) as progress,
        closing(run_in_order(tasks, workers, settings, counters, progress.update)) as results,
    ):
        for task, result in zip(tasks, results, strict=True):
            bin_path, lengths_path = shard_paths(settings.scratch, result.index)
            writer.add_shard(bin_path, np.load(lengths_path))
            bin_path.unlink()
            lengths_path.unlink()
            totals.add(task, result)


def _checked_prefix(options: PreprocessOptions) -> str:
    prefix = dataset_prefix(options.output_prefix)
    if not os.path.basename(prefix):
        raise UserError(
            f"--output-prefix {options.output_prefix}: names a folder; add a file name, such as {prefix}dataset"
        )
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if not options.overwrite:
        refuse_existing_outputs(prefix)
    folder, name = os.path.split(os.path.abspath(prefix))
    for leftover in glob.glob(f"{glob.escape(os.path.join(folder, '.' + name))}.*.partial"):
        print(
            f"{leftover}: left by a run that was killed, or of one still running; remove it in the former case",
            file=sys.stderr,
        )
    return prefix


def _document_end(tokenizer: TokenizerHandle, options: PreprocessOptions) -> tuple[str, int] | None:
    """The end-of-document token and id. Only a dataset without them may do with a tokenizer that has none."""
    try:
        return tokenizer.eod(options.eod_token)
    except UserError:
        if options.append_eod or options.eod_token is not None:
            raise
        return None


def _say_start(
    files: Sequence[InputFile],
    tokenizer: TokenizerHandle,
    eod: tuple[str, int] | None,
    options: PreprocessOptions,
    workers: int,
) -> None:
    end = f"documents end with {eod[0]} ({eod[1]})" if eod and options.append_eod else "documents end with no token"
    print(
        f"{len(files)} input files, {sum(file.size for file in files) / 1e6:,.1f} MB; tokenizer {tokenizer.name} "
        f"({tokenizer.vocab_size:,} ids); {end}; {workers} workers",
        file=sys.stderr,
        flush=True,
    )


def _nothing_found(options: PreprocessOptions, totals: _Totals) -> str:
    skipped = sum(tally.skipped_lines for tally in totals.tallies)
    empty = sum(tally.empty_documents for tally in totals.tallies)
    first = f", the first being {totals.first_skipped}" if totals.first_skipped else ""
    return (
        f"--input {' '.join(options.input)}: no document with a token ({len(totals.tallies)} input files, {empty} "
        f"empty documents, {skipped} malformed lines skipped{first}); nothing was written"
    )


def _sidecar(
    files: Iterable[InputFile],
    tokenizer: TokenizerHandle,
    eod: tuple[str, int] | None,
    options: PreprocessOptions,
    totals: _Totals,
) -> Sidecar:
    sources = [
        Source(file.path, file.size, tally.documents, tally.empty_documents, tally.skipped_lines)
        for file, tally in zip(files, totals.tallies, strict=True)
    ]
    return Sidecar(
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        append_eod=options.append_eod,
        eod_token=eod[0] if eod else None,
        eod_id=eod[1] if eod else None,
        characters=totals.characters,
        text_bytes=totals.text_bytes,
        empty_documents=sum(source.empty_documents for source in sources),
        sources=tuple(sources),
    )


def format_report(report: PreprocessReport) -> str:
    """The short table that the command prints at the end."""
    sidecar = report.sidecar
    end = f"{sidecar.eod_token} ({sidecar.eod_id})" if sidecar.append_eod else "none appended"
    skipped = f"{sidecar.skipped_lines:,}" + (f", the first: {report.first_skipped}" if report.first_skipped else "")
    rows: dict[str, Any] = {
        "documents": f"{sidecar.documents:,}",
        "tokens": f"{sidecar.tokens:,} ({sidecar.dtype})",
        "characters": f"{sidecar.characters:,}",
        "bytes per token": f"{sidecar.text_bytes / sidecar.tokens:.2f}",
        "document end": end,
        "empty documents left out": f"{sidecar.empty_documents:,}",
        "malformed lines skipped": skipped,
        "speed": f"{sidecar.text_bytes / 1e6 / report.seconds:,.1f} MB of text/s, "
        f"{sidecar.tokens / report.seconds:,.0f} tokens/s, {report.seconds:,.1f} s",
        "files": " ".join(report.files),
    }
    return "\n".join(f"{name:<25} {value}" for name, value in rows.items())
