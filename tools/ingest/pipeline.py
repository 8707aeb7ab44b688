"""Text files -> indexed datasets: plan, tokenize in parallel, decide, assemble, publish.

    options.py     what was asked            inputs.py, formats.py   which files, of which formats
    tasks.py       cut into tasks            readers/, texts.py      records, and their texts
    pool.py        worker processes          worker.py, cleaning.py  task -> shard
    workspace.py   restart after a kill      assembly.py             shards -> datasets, sidecars

The datasets' bytes depend on the input, the tokenizer and the options that concern documents, and not on the number of
workers or the size of tasks. Nothing stands under a final name before all of it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from ... import __version__
from ...engine.data.dataset_writer import IndexedDatasetWriter, best_dtype
from ...engine.data.document_frame import DocumentFrame, Token, TokenizerFrame, describe_tokens, ids_of, name_of
from ...engine.data.index_format import dataset_prefix
from ...engine.data.sidecar import InputSource, Sidecar
from ...engine.data.tokenizer import TokenizerHandle, TokenizerSpec
from ...engine.data.tokenizer_files import find_tokenizer_file
from ...engine.errors import UserError
from .assembly import Assembly, SourceTotals
from .chat_bos import ChatBos
from .cleaning import Cleaner
from .faults import UNREADABLE
from .held_out import held_out_files, read_held_out
from .inputs import expand_inputs, with_stdin_copied
from .near_dedup import MinHasher
from .options import PreprocessOptions, contents_of, task_key
from .output_check import output_prefixes, require_free, what_is_read
from .pool import run_here, run_tasks, shared_counters, start_early, usable_cores
from .preload import use_one_thread
from .progress import ProgressReport
from .rejects import write_rejects
from .shards import Shard, TaskResult
from .tasks import Span, are_small, choose_task_bytes, plan_tasks, shard_of_tasks
from .tokenizer_choice import check_vocabulary, choose_tokenizer, read_frame
from .worker import FastPathError, WorkerSettings
from .workspace import finished_results, open_workspace, remove_workspace

_SHOWN_NOTES = 20


@dataclass(frozen=True)
class PreprocessReport:
    """What was done."""

    sidecars: dict[str, Sidecar]
    """By prefix."""
    first_bad: str | None
    """``file:line: reason`` of the first record that was skipped."""
    encoder: str
    """The library that encoded, and what else is to be said of it."""
    seconds: float
    files: tuple[str, ...]
    """The files written."""


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Tokenize a corpus to ``{output_prefix}.bin``, ``.idx`` and ``.json``, and what else was asked for.

    Raises:
        UserError: wrong options, input or tokenizer, no token in the input, the output exists or cannot be written, a
            worker was killed. Nothing stands under a final name, and an existing dataset is as it was; finished parts
            are kept in a hidden folder, where the same command finds them.
    """
    started = time.monotonic()
    options.check()
    prefix = _checked_prefix(options)
    try:
        run = _Run(options, prefix)
        run.compare_with_serving()
        with open_workspace(prefix) as work:
            run.plan(work)
            try:
                run.tokenize()
            except FastPathError as difference:
                print(f"{difference}; going on with the reference tokenizer", file=sys.stderr)
                run = _Run(replace(options, encoder="reference"), prefix)
                run.plan(work)
                run.tokenize()
            report = run.assemble()
            remove_workspace(work)
    except OSError as error:
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}; no dataset was written") from error
    return replace(report, seconds=time.monotonic() - started)


class _Run:
    """One run, from its options to its datasets."""

    def __init__(self, options: PreprocessOptions, prefix: str) -> None:
        self.options, self.prefix = options, prefix
        self.files = expand_inputs(options.input, options.inputs)
        choice = choose_tokenizer(options)
        _say_notes(choice.notes)
        tokenizer_file = find_tokenizer_file(choice.name)
        self.works_here = options.encoder != "fast" and are_small(self.files, tokenizer_file)
        """Whether the tasks are done in this process."""
        tokenizer = TokenizerSpec(
            choice.name, tokenizer_file, options.allow_special_tokens, self._backend, options.eod_token
        )
        # Before there is any file or process: an output may bear the name of an input.
        self.held_out_files = held_out_files(options.held_out, options.text_choice) if options.held_out else []
        reads = what_is_read(options, self.files, self.held_out_files, tokenizer_file)
        require_free({prefix: output_prefixes(options, prefix)}, reads, options.overwrite, rejects=True)
        use_one_thread()
        if not self.works_here:
            start_early(tokenizer)
        self.tokenizer, self.eod = _load_with_document_end(tokenizer, options)
        if self.works_here and self.tokenizer.kind == "tokenizer.json" and options.encoder == "auto":
            self.tokenizer.use_reference("loading a faster one takes longer than encoding this input")
        frame = read_frame(self.tokenizer, choice)
        self.begin = frame.documents_begin_with(options.bos)
        """Tokens that documents begin with; of conversations known once the chat template has been read."""
        self.end = self._document_end_tokens(frame)
        """Tokens that documents end with, the end-of-document token last."""
        self.named_bos = frame.prefix or ((frame.bos,) if frame.bos else ())
        _say_notes(check_vocabulary(self.tokenizer, choice, (*self.begin, *self.end)))
        if frame.remark and options.bos == "auto" and not options.chat:
            _say_notes([frame.remark])
        self.dtype = best_dtype(self.tokenizer.vocab_size)
        self.results: dict[str, TaskResult] = {}
        self.held_out: Path | None = None
        self.chat_date = options.chat_date or date.today().isoformat()

    def compare_with_serving(self) -> None:
        """Say if transformers would serve the model with other ids. For conversations :meth:`plan` checks this."""
        if not self.options.chat and (note := self.tokenizer.serving_note()):
            _say_notes([note])

    def plan(self, work: Path) -> None:
        """Cut the input into tasks, to be done in the folder ``work``."""
        self.work = work
        self.files = with_stdin_copied(self.files, work / "stdin")
        index, count = self.options.shard_place or (0, 1)
        task_bytes = self.options.task_bytes or choose_task_bytes(self.files, count)
        tasks = shard_of_tasks(plan_tasks(self.files, task_bytes), index, count)
        chat = self._prepare_chat()
        contents = contents_of(
            self.options,
            version=__version__,
            tokenizer=self.tokenizer.sha256,
            # The token decides what text becomes, the ids what documents begin and end with.
            eod_token=self.eod[0] if self.eod else None,
            frame=f"{ids_of(self.begin)} {ids_of(self.end)}",
            chat=chat,
            held_out=self._prepare_held_out(),
            minhash=self._minhash_fingerprint(),
        )
        self.keys = {task_key([_facts(span) for span in task.spans], contents): task for task in tasks}

    def tokenize(self) -> None:
        """Have the workers make all shards that are not there yet."""
        allowed = {"malformed": self.options.skip_bad_lines, UNREADABLE: self.options.skip_bad_lines}
        allowed["invalid UTF-8"] = self.options.skip_bad_lines or self.options.drop_invalid_utf8
        self.results = finished_results(self.work, self.keys, {kind for kind, yes in allowed.items() if not yes})
        todo = [(task, key) for key, task in self.keys.items() if key not in self.results]
        workers = min(self.options.workers or usable_cores(), max(len(todo), 1))
        self._say_start(workers, len(todo))
        # One counter set for each task of the corpus, since a task's index names its own.
        num_counters = 3 * (1 + max((task.index for task in self.keys.values()), default=0))
        counters = np.zeros(num_counters, np.int64) if self.works_here else shared_counters(num_counters)
        seen = np.frombuffer(counters, dtype=np.int64).reshape(-1, 3)
        total = sum(task.num_bytes for task in self.keys.values())
        before = total - sum(task.num_bytes for task, _ in todo)
        with ProgressReport("tokenizing", total, before) as progress:

            def show() -> None:
                done, tokens, bad = seen.sum(axis=0).tolist()
                progress.show(before + done, tokens, bad)

            if todo:
                settings = self._settings()
                run = (
                    run_here(todo, self.tokenizer, settings, counters, show)
                    if self.works_here
                    else run_tasks(todo, workers, settings, counters, show)
                )
                with closing(run) as results:
                    for result in results:
                        self.results[result.key] = result

    def assemble(self) -> PreprocessReport:
        """Make the datasets from the shards, and publish them together."""
        results = [self.results[key] for key in self.keys]
        _print_notes([note for result in results for note in result.notes])
        shards = [Shard(self.work, key) for key in self.keys]
        assembly = Assembly(shards, self.options, self.work, len(self.options.input))
        first_bad = next((result.first_bad for result in results if result.first_bad), None)
        if self._must_have_documents and not any(result.documents for result in results):
            remove_workspace(self.work)  # nothing in it to go on with
            raise UserError(self._nothing_found(results, first_bad))
        prefixes = [f"{self.prefix}.{side}" if side else self.prefix for side in assembly.sides]
        size = sum(shard.tokens.stat().st_size for shard in shards)
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(self._writer(prefix)) for prefix in prefixes]
            progress = stack.enter_context(ProgressReport("writing", size))
            done = 0

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                progress.show(done, done // self.dtype.itemsize)

            totals = assembly.write(writers, on_bytes)
            left_out = self._left_out(results, assembly)
            for side, writer, total in zip(assembly.sides, writers, totals, strict=True):
                if writer.num_tokens == 0 and self._must_have_documents:
                    raise UserError(
                        f"--split: no document fell to {side!r}; give it a larger share, or the corpus more documents"
                        if side
                        else self._nothing_found(results, first_bad)
                    )
                writer.sidecar = self._sidecar(total, left_out)
                writer.prepare()
            rejects = write_rejects(shards, self.prefix, self.work)
        files = [f"{p}{end}" for p in prefixes for end in (".bin", ".idx", ".json", ".mask.bin", ".metadata.jsonl")]
        sidecars = {prefix: Sidecar.read(prefix) for prefix in prefixes}
        return PreprocessReport(
            {prefix: sidecar for prefix, sidecar in sidecars.items() if sidecar is not None},
            first_bad,
            self._encoder(results),
            0.0,
            (*(path for path in files if os.path.exists(path)), *rejects),
        )

    @property
    def _backend(self) -> str:
        """Of the tokenizer: one of ``BACKENDS``."""
        # The reference says where in the text of a conversation each token lies.
        if self.options.chat or (self.works_here and self.options.encoder == "auto"):
            return "reference"
        return "auto" if self.options.encoder == "fast" else self.options.encoder

    @property
    def _must_have_documents(self) -> bool:
        """Whether a dataset without documents is an error: of one shard of many it may be the truth."""
        return self.options.shard_place is None

    def _writer(self, prefix: str) -> IndexedDatasetWriter:
        return IndexedDatasetWriter(
            prefix,
            self.dtype,
            overwrite=self.options.overwrite,
            mask=self.options.chat,
            metadata=bool(self.options.metadata),
            scratch=self.work / f"dataset-{os.path.basename(prefix)}",
        )

    def _settings(self) -> WorkerSettings:
        return WorkerSettings(
            self._dated_options,
            self.tokenizer.spec,
            self.tokenizer.sha256,
            self.dtype.str,
            self.work,
            self._frame,
            self._chat_bos,
            self.held_out,
        )

    @property
    def _frame(self) -> DocumentFrame:
        return DocumentFrame(ids_of(self.begin), ids_of(self.end))

    @property
    def _dated_options(self) -> PreprocessOptions:
        return replace(self.options, chat_date=self.chat_date)

    def _document_end_tokens(self, frame: TokenizerFrame) -> tuple[Token, ...]:
        if self.eod is None or not self.options.append_eod:
            return ()
        # A chat template writes itself what the tokenizer would put behind a text.
        suffix = () if self.options.chat else frame.suffix
        return suffix if suffix and suffix[-1][1] == self.eod[1] else (*suffix, self.eod)

    @property
    def _chat_bos(self) -> ChatBos:
        return ChatBos(self.options.bos, ids_of(self.named_bos))

    def _prepare_chat(self) -> str | None:
        """Check that conversations can be encoded, and as transformers does; what stands for how they are."""
        if not self.options.chat:
            return None
        from .chat import chat_encoder

        encoder = chat_encoder(self._dated_options, self.tokenizer.file, self._frame, self._chat_bos)
        encoder.check_against_transformers()
        self.begin = self.named_bos if encoder.begins_with_bos else ()
        if encoder.tells_date:
            # Kept in the sidecar, so that shards of different days are not joined.
            self.options = self._dated_options
        return encoder.fingerprint

    def _encoder(self, results: Sequence[TaskResult]) -> str:
        failures = sum(result.fast_path_failures for result in results)
        reference = f"; it failed on {failures:,} batches, which the reference encoded" if failures else ""
        return (results[0].encoder if results else self.tokenizer.encoder) + reference

    def _prepare_held_out(self) -> str | None:
        """Write the n-grams of the ``--held-out`` files to a file for the workers; what stands for them."""
        if not self.options.held_out:
            return None
        cleaner = Cleaner(replace(self.options, min_chars=0))
        ngrams = read_held_out(self.held_out_files, self.options.text_choice, cleaner, self.work, self.options.reading)
        self.held_out = self.work / "held-out.npz"
        ngrams.save(self.held_out)
        return ngrams.fingerprint

    def _minhash_fingerprint(self) -> str | None:
        threshold = self.options.minhash_threshold
        return None if threshold is None else MinHasher(threshold).fingerprint

    def _left_out(self, results: Sequence[TaskResult], assembly: Assembly) -> list[Counter[str]]:
        """By source: what workers and assembly left out, by reason."""
        total = [Counter(counter) for counter in assembly.left_out]
        for result in results:
            for source, reasons in result.left_out.items():
                total[int(source)].update(reasons)
        return total

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer; computed when the workers are done."""
        return self.tokenizer.fingerprint

    def _sidecar(self, totals: SourceTotals, left_out: Sequence[Counter[str]]) -> Sidecar:
        mine = [[file for file in self.files if file.source == index] for index in range(len(self.options.input))]
        return Sidecar(
            tokenizer=self.tokenizer.name,
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            append_eod=self.options.append_eod,
            eod_token=self.eod[0] if self.eod else None,
            eod_id=self.eod[1] if self.eod else None,
            sources=tuple(
                InputSource(
                    name=name,
                    files=len(files),
                    bytes=sum(file.size for file in files),
                    documents=int(totals.documents[index]),
                    tokens=int(totals.tokens[index]),
                    characters=int(totals.characters[index]),
                    text_bytes=int(totals.text_bytes[index]),
                    left_out=dict(left_out[index]),
                )
                for index, (name, files) in enumerate(zip(self.options.input, mine, strict=True))
            ),
            options=self.options.record(),
            bos_token=name_of(self.begin) or None,
            bos_ids=ids_of(self.begin),
            eos_ids=ids_of(self.end[:-1]),
            tokenizer_fingerprint=self.fingerprint,
        )

    def _say_start(self, workers: int, num_todo: int) -> None:
        begin = f"documents begin with {describe_tokens(self.begin)}" if self.begin else "documents begin without a BOS"
        end = f"end with {describe_tokens(self.end)}" if self.end else "end with no token"
        again = len(self.keys) - num_todo
        for note in self.tokenizer.notes:
            print(note, file=sys.stderr)
        print(
            f"{len(self.files)} input files, {sum(file.size for file in self.files) / 1e6:,.1f} MB; tokenizer "
            f"{self.tokenizer.name} ({self.tokenizer.vocab_size:,} ids); {begin} and {end}; {workers} "
            "workers" + (f"; {again} of {len(self.keys)} parts are there from a run before" if again else ""),
            file=sys.stderr,
            flush=True,
        )

    def _nothing_found(self, results: Sequence[TaskResult], first_bad: str | None) -> str:
        reasons: Counter[str] = Counter()
        for result in results:
            for counts in result.left_out.values():
                reasons.update(counts)
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items())) or "nothing left out"
        first = f"; the first malformed: {first_bad}" if first_bad else ""
        return (
            f"--input {' '.join(self.options.input)}: no document to write ({len(self.files)} input files; "
            f"{left_out}{first})"
        )


def _say_notes(notes: Iterable[str]) -> None:
    """Print what a user may not have meant."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _facts(span: Span) -> dict[str, object]:
    """What decides the contents of a span."""
    file = span.file
    return {
        "path": os.path.abspath(file.path),
        "size": file.size,
        "modified": file.modified,
        "format": file.format,
        "source": file.source,
        "start": span.start,
        "stop": span.stop,
    }


def _print_notes(notes: Sequence[str]) -> None:
    """Print what readers found worth knowing about the files."""
    _say_notes(notes[:_SHOWN_NOTES])
    if len(notes) > _SHOWN_NOTES:
        _say_notes([f"{len(notes) - _SHOWN_NOTES:,} more such notes about files"])


def _checked_prefix(options: PreprocessOptions) -> str:
    prefix = dataset_prefix(options.output_prefix)
    if not os.path.basename(prefix):
        raise UserError(
            f"--output-prefix {options.output_prefix}: names a folder; add a file name, such as {prefix}dataset"
        )
    if options.shard_place is not None:
        prefix += ".shard-{}-of-{}".format(*options.shard_place)
    return prefix


def _load_with_document_end(spec: TokenizerSpec, options: PreprocessOptions) -> tuple[TokenizerHandle, Token | None]:
    """Load a tokenizer and find its end-of-document token, which only a dataset without them may do without."""
    tokenizer = replace(spec, eod_token=None).load()
    try:
        return tokenizer, tokenizer.eod(spec.eod_token)
    except UserError:
        if options.append_eod or options.eod_token is not None:
            raise
        return replace(spec, eod_token=None).load(), None  # a token that is refused may already be ordinary text
