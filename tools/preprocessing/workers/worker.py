"""The work of a worker process: one task -> one output (task_output.py).

A reader yields records; text_choice.py or the chat encoder takes the document from each; cleaner.py cleans and filters;
the tokenizer encodes batches; task_writer.py writes them. Memory is bounded by a batch, however long a document is.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from ....engine.errors import UserError
from ....engine.tokenizer.backends import FlatIds
from ...tokenizer.document_frame import DocumentFrame
from ...tokenizer.handle import TokenizerHandle, TokenizerSpec
from ..chat.conversation import ChatBos, EncodedChat
from ..cleaning.cleaner import Cleaner
from ..dataset.bins import bin_of, require_few
from ..fim import FimEncoder, FimRule
from ..formats import FORMATS
from ..options import PreprocessOptions
from ..records.errors import UNREADABLE, DamagedError, LeftOutError, MalformedError, Where
from ..records.long_text import LongText, encode_in_pieces
from ..records.reading import ReadContext, Record, readable_part
from ..records.text_choice import metadata_line
from ..windows import Windows
from .encoded import ChatDocument, Documents, Extra, LongDocument, LongTextLine, TextLines
from .no_tokenizer import NoTokenizer
from .shared_tokenizer import load_tokenizer_once
from .task_output import DROPPED_TURNS, TaskOutput, TaskResult
from .task_writer import TaskWriter
from .tasks import Span, Task

_CHECKED_AT_START = 32_000
_SHOWN_CHARACTERS = 1000  # of a skipped text
_MIN_CHECKED = 100
_CHECKED_SHARE = 1 << 15
"""Characters that the reference tokenizer encodes too: in the first task, at least in each task, and as a share of a
task's bytes. The reference is some hundred times slower."""


class FastPathError(Exception):
    """The fast tokenizer gave other ids than the reference."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know about the run."""

    options: PreprocessOptions
    """``chat_date`` is set, so that all workers use the same day."""
    tokenizer: TokenizerSpec | None
    """None: the run writes text. With the end-of-document token, which is ordinary text within a document."""
    tokenizer_sha256: str
    dtype: str
    folder: Path
    """For outputs and temporary files."""
    frame: DocumentFrame
    """Ids before and after each document; an end-of-document token is the last one."""
    chat_bos: ChatBos
    held_out: Path | None
    """File of an ``NgramFilter`` with the n-grams of held-out texts."""
    fim: FimRule | None = None
    """Which documents are rearranged for fill-in-the-middle; None: none."""
    windows: Windows | None = None
    """How long documents are cut; None: they stay whole."""


@dataclass
class _Batch:
    texts: list[str] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    characters: int = 0


class TaskRunner:
    """Runs tasks in this process.

    Args:
        progress: shared int64 [3 x tasks]: input bytes read, tokens written and bad records of each task. Only the
            worker that runs a task writes its entries, so that no lock is needed, which a killed worker would keep.
        tokenizer: that of ``settings``.
    """

    def __init__(self, settings: WorkerSettings, progress: Any, tokenizer: TokenizerHandle) -> None:
        self._settings, self._options = settings, settings.options
        self._progress = progress
        self._tokenizer = tokenizer
        self._cleaner = Cleaner(self._options, settings.held_out)
        self._fim = None if settings.fim is None else FimEncoder(settings.fim, tokenizer.encode_flat)
        self._choose: Callable[[Any], str | LongText | EncodedChat] = self._options.text_choice.text
        if self._options.chat:
            from ..chat.encoder import chat_encoder

            self._chat = chat_encoder(self._options, tokenizer.file, settings.frame, settings.chat_bos)
            self._choose = self._encode_chat

    def run(self, task: Task, key: str) -> TaskResult:
        """Tokenize ``task`` to the output ``key``.

        Raises:
            UserError: a file cannot be read, or a record is not a document and may not be skipped.
            FastPathError: the fast tokenizer failed its check.
        """
        reason = self._tokenizer.fallback_reason
        self._result = TaskResult(key, encoder=self._tokenizer.encoder + (f" ({reason})" if reason else ""))
        failures = self._tokenizer.fast_path_failures
        self._task = task
        self._bins: dict[str, int] = {}
        self._unchecked = _CHECKED_AT_START if task.index == 0 else max(_MIN_CHECKED, task.num_bytes // _CHECKED_SHARE)
        folder = self._settings.folder
        done = 0
        with TaskWriter(TaskOutput(folder, key), self._options, self._settings.dtype, self._result) as self._output:
            for span in task.spans:
                context = ReadContext(
                    self._refuse,
                    folder,
                    columns=self._columns(),
                    options=self._options.reading,
                    note=self._result.notes.append,
                )
                self._path, self._source = span.file.path, span.file.source
                try:
                    for _ in self._run_span(span, context):
                        self._show(done + context.consumed)
                except DamagedError as error:
                    raise UserError(f"{error}; or keep what comes before with --skip-bad-lines") from error
                done += span.num_bytes
            self._result.fast_path_failures = self._tokenizer.fast_path_failures - failures
            self._output.finish()
        self._show(task.num_bytes)
        return self._result

    def _show(self, consumed: int) -> None:
        start = 3 * self._task.index
        self._progress[start : start + 3] = [consumed, self._result.tokens, self._result.bad]

    def _columns(self) -> tuple[str, ...] | None:
        if self._options.chat:
            return None
        bins = () if self._options.bins is None else (self._options.bins,)
        roots = (name for key in (*self._options.metadata, *bins) for name in (key, key.partition(".")[0]))
        return tuple(dict.fromkeys((*self._options.text_choice.roots, *roots)))

    def _run_span(self, span: Span, context: ReadContext) -> Iterator[None]:
        """Write the documents of ``span``; yield after each batch."""
        batch = _Batch()
        choose, limit = self._choose, self._options.batch_characters
        keeps_extras = self._options.writes_lines or self._options.bins is not None
        with closing(_records(span, context)) as records:
            for value, where, raw in records:
                try:
                    extras = [self._extra(value)] if keeps_extras else []
                    content = choose(value)
                except MalformedError as error:
                    context.refuse(where, str(error), error.kind, None if raw is None else bytes(raw))
                    continue
                except LeftOutError as left_out:
                    self._result.count(self._source, str(left_out))
                    continue
                if type(content) is str:
                    batch.texts.append(content)
                    batch.extras += extras
                    batch.characters += len(content) + 1  # + 1: a batch of empty texts must end too
                    if batch.characters <= limit:
                        continue
                self._write(batch)
                batch = _Batch()
                if isinstance(content, LongText):
                    self._write_long(content, extras)
                elif isinstance(content, EncodedChat):
                    self._output.add(self._source, ChatDocument(content, extras))
                yield
        self._write(batch)
        yield

    def _extra(self, value: Any) -> Extra:
        """Return what is kept of a record besides its text. Raise MalformedError."""
        options = self._options
        line = metadata_line(value, options.metadata) if options.writes_lines else b""
        return Extra(line, 0 if options.bins is None else self._number_of_bin(bin_of(value, options.bins)))

    def _number_of_bin(self, value: str) -> int:
        number = self._bins.setdefault(value, len(self._bins))
        if number == len(self._result.bins):
            self._result.bins.append(value)
            require_few(len(self._bins), self._options.bins or "")
        return number

    def _encode_chat(self, value: Any) -> EncodedChat:
        """Encode the conversation in a record."""
        if not isinstance(value, dict):
            raise MalformedError("a text, not a record with a conversation")
        encoded = self._chat.encode(value)
        if encoded is None:
            raise LeftOutError("no whole turn fits --max-tokens")
        if encoded.turns_dropped:
            self._result.count(self._source, DROPPED_TURNS, encoded.turns_dropped)
        for note, number in encoded.notes.items():
            self._result.count_note(self._source, note, number)
        return encoded

    def _refuse(self, where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
        """Count a record that is not a document, or end the run."""
        options = self._options
        if not (options.skip_bad_lines or (kind == "invalid UTF-8" and options.drop_invalid_utf8)):
            raise UserError(
                f"{where.describe()}: {reason}; fix it, or leave such records out with --skip-bad-lines"
                + (" or --drop-invalid-utf8" if kind == "invalid UTF-8" else "")
            )
        if self._result.first_bad is None:
            self._result.first_bad = f"{where.describe()}: {reason}"
        if kind == UNREADABLE:
            self._result.notes.append(f"{where.describe()}: left out its unreadable rest: {reason}")
        self._result.count(self._source, kind)
        self._output.reject(where, reason, raw)

    def _write(self, batch: _Batch) -> None:
        """Clean, encode and write a batch."""
        texts, extras = batch.texts, batch.extras
        if self._cleaner.active:
            cleaned = self._cleaner.clean_batch(texts, self._count_change)
            for _, reason in cleaned:
                if reason is not None:
                    self._result.count(self._source, reason)
            extras = list(itertools.compress(extras, [reason is None for _, reason in cleaned]))
            texts = [text for text, reason in cleaned if reason is None]
        if texts:
            self._encode(texts, extras)

    def _count_change(self, step: str) -> None:
        self._result.count_change(self._source, step)

    def _encode(self, texts: list[str], extras: list[Extra]) -> None:
        if self._options.to_jsonl:
            self._output.add(self._source, TextLines(texts, extras))
            return
        try:
            ids, lengths = self._encoded(texts)
        except UserError as error:
            # The tokenizer's library failed on some of them: encode one by one to find which.
            if len(texts) == 1:
                self._refuse(Where(self._path), str(error), "malformed", texts[0][:_SHOWN_CHARACTERS])
                return
            for number, text in enumerate(texts):
                self._encode([text], extras[number : number + 1])
            return
        documents = Documents(texts, ids, lengths, extras)
        if self._settings.windows is not None:
            documents, number = documents.in_windows(self._settings.windows)
            self._count_in_windows(number)
        self._output.add(self._source, documents)

    def _count_in_windows(self, number: int) -> None:
        if number:
            self._result.count_change(self._source, "--window", number)

    def _encoded(self, texts: list[str]) -> FlatIds:
        """Return the ids of documents with the frame around each, some of them rearranged for fill-in-the-middle."""
        if self._fim is None:
            self._compare(texts)
            return self._tokenizer.encode_documents(texts, self._settings.frame)
        cuts = self._fim.cut(texts)
        parts = self._fim.parts(texts, cuts)
        self._compare(parts)
        flat, counts = self._fim.join(self._tokenizer.encode_flat(parts), texts, cuts)
        for name, number in counts.items():
            self._result.count_change(self._source, name, number)
        return self._settings.frame.around(*flat)

    def _compare(self, texts: list[str]) -> None:
        """Compare the fast tokenizer with the reference on a sample."""
        if self._unchecked <= 0:
            return
        sample = []
        for text in texts:
            sample.append(text[: self._unchecked])
            self._unchecked -= len(text) + 1
            if self._unchecked <= 0:
                break
        if difference := self._tokenizer.check_fast_path(sample):
            raise FastPathError(difference)

    def _write_long(self, text: LongText, extras: list[Extra]) -> None:
        """Clean, encode and write one document in pieces."""
        changes: Counter[str] = Counter()
        windows = self._settings.windows

        def cleaned() -> Iterator[str]:
            changes.clear()  # MinHash reads the text again
            for piece, reason in self._cleaner.clean_pieces(text.pieces(), lambda step: changes.update([step])):
                if reason is not None:
                    raise LeftOutError(reason)
                yield piece

        try:
            with self._output.undone_unless_added():
                if self._options.to_jsonl:
                    self._write_long_line(LongTextLine(extras[0], cleaned), cleaned())
                else:
                    self._encode_long(LongDocument(self._settings.frame, extras, cleaned, windows), cleaned())
            for step in changes:
                self._count_change(step)
        except MalformedError as error:
            self._refuse(text.where, str(error), error.kind, None)
        except LeftOutError as left_out:
            self._result.count(self._source, str(left_out))

    def _encode_long(self, document: LongDocument, pieces: Iterator[str]) -> None:
        if self._fim is not None:
            self._result.notes.append(f"{self._path}: a document is too long for memory; --fim-rate leaves it as it is")

        def encode(piece: str) -> np.ndarray:
            return self._tokenizer.encode_flat([piece])[0]

        for piece, ids in encode_in_pieces(pieces, encode):
            self._output.write_tokens(document.extend(piece, ids))
        self._output.write_tokens(document.end())
        self._count_in_windows(int(document.lengths[0] != document.own_lengths[0]))
        self._output.add(self._source, document)

    def _write_long_line(self, document: LongTextLine, pieces: Iterator[str]) -> None:
        self._output.write_line(document.begin_line())
        for piece in pieces:
            self._output.write_line(document.extend_line(piece))
        self._output.add(self._source, document)


def _records(span: Span, context: ReadContext) -> Generator[Record, None, None]:
    """Yield the records of ``span``, up to where its file is damaged."""
    yield from readable_part(FORMATS[span.file.format].read(span, context), span.file.path, context)


_make_runner: Callable[[], TaskRunner]


def start_worker(settings: WorkerSettings, progress: Any, tokenizer: TokenizerHandle | None = None) -> None:
    """Make this process a worker, with the tokenizer of the process that it was forked from if that is given."""
    # Ctrl-C reaches the whole process group; the parent decides, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    global _make_runner
    # Load with the first task: only errors of a task reach the parent.
    _make_runner = functools.cache(
        lambda: TaskRunner(
            settings,
            np.frombuffer(progress, dtype=np.int64),
            tokenizer or _tokenizer_of(settings),
        )
    )


def _tokenizer_of(settings: WorkerSettings) -> TokenizerHandle:
    if settings.tokenizer is None:
        return NoTokenizer()
    return load_tokenizer_once(settings.tokenizer, settings.tokenizer_sha256)


def run_task(task: Task, key: str) -> TaskResult:
    """Run ``task`` in a process that :func:`start_worker` has prepared."""
    return _make_runner().run(task, key)


def _exit_with_parent() -> None:
    """End this process with its parent: after a kill it would wait for its next task forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
