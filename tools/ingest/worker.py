"""What a worker process does: one task -> one shard (shards.py).

Readers give records, texts.py their text, cleaning.py decides and cleans, the tokenizer gives ids, and the shard is
written as they come: memory is bounded by a batch, whatever the size of a task or of a document.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.data.document_frame import DocumentFrame
from ...engine.data.tokenizer import TokenizerHandle, TokenizerSpec
from ...engine.errors import UserError
from .chat_bos import ChatBos
from .cleaning import Cleaner
from .formats import FORMATS
from .long_text import LongText, encode_in_pieces
from .options import BATCH_CHARACTERS
from .preload import load_tokenizer_once
from .readers import lines
from .records import (
    UNREADABLE,
    DamagedError,
    LeftOutError,
    MalformedError,
    ReadContext,
    ReadOptions,
    Record,
    Where,
    readable_part,
)
from .shard_writer import ShardWriter
from .shards import Shard
from .tasks import Span, Task
from .texts import TextChoice, metadata_line

_CHECKED_AT_START = 32_000
_SHOWN_CHARACTERS = 1000  # of a refused text
_LEAST_CHECKED = 100
_CHECKED_SHARE = 1 << 15
"""Characters that the reference tokenizer encodes too: at the start of a run, at least in each task, and as a share of
a task's bytes. It is some hundred times slower."""


class FastPathError(Exception):
    """The fast tokenizer gave other ids than the reference."""


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker needs to know about the run."""

    tokenizer: TokenizerSpec
    tokenizer_sha256: str
    eod_token: str | None
    """Appended to each document; None: nothing is. From then on it is ordinary text in text."""
    dtype: str
    folder: Path
    """Where shards and temporary files are written."""
    frame: DocumentFrame = field(default_factory=DocumentFrame)
    """Ids in front of each document and behind it, the end-of-document token included."""
    text: TextChoice = field(default_factory=lambda: TextChoice(("text",)))
    metadata: tuple[str, ...] = ()
    chat: bool = False
    chat_template: Path | None = None
    chat_bos: ChatBos = field(default_factory=ChatBos)
    chat_date: str = "2000-01-01"
    """The day, in ISO format, that templates take for today: one for all workers."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    skip_bad_lines: bool = False
    drop_invalid_utf8: bool = False
    normalize_nfc: bool = False
    strip_control: bool = False
    min_chars: int = 0
    min_tokens: int = 0
    max_tokens: int | None = None
    digests: bool = False
    minhash_threshold: float | None = None
    held_out: Path | None = None
    """The n-grams of held-out texts; see :class:`retemper.tools.ingest.cleaning.NgramFilter`."""
    batch_characters: int = BATCH_CHARACTERS


@dataclass
class TaskResult:
    """What went into a shard, and what did not. Kept as JSON beside it."""

    key: str
    documents: int = 0
    tokens: int = 0
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source (its number as a string) and reason."""
    first_bad: str | None = None
    """``file:line: reason`` of the first record that was skipped."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing about files that were read without errors, and which ones are damaged."""
    fast_path_failures: int = 0
    """Batches that the reference encoded because the fast path failed on them."""
    encoder: str = ""
    """The library that encoded, and why it was not a faster one."""
    tokens_xxh3_128: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file of the shard: a machine that lost power may keep a file's name without its end."""

    def count(self, source: int, reason: str, number: int = 1) -> None:
        """Note ``number`` documents that are left out."""
        reasons = self.left_out.setdefault(str(source), {})
        reasons[reason] = reasons.get(reason, 0) + number

    def count_note(self, source: int, note: str, number: int) -> None:
        """Count something of the documents kept that is not trained on. Of rare names the first ones are told apart."""
        known = self.left_out.get(str(source), {})
        if KEPT_NOTE + note not in known and sum(name.startswith(KEPT_NOTE) for name in known) >= _MOST_NOTES:
            note = "other keys not used"
        self.count(source, KEPT_NOTE + note, number)

    @property
    def bad(self) -> int:
        """Records that are no documents."""
        return sum(n for reasons in self.left_out.values() for name, n in reasons.items() if name in BAD_KINDS)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(path: Path) -> TaskResult:
        """From the file that :meth:`to_json` made.

        Raises:
            UserError: it is damaged.
        """
        try:
            return TaskResult(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it") from None


BAD_KINDS = ("malformed", "invalid UTF-8", UNREADABLE)
DROPPED_TURNS = "turns beyond --max-tokens"
"""A count of messages of conversations that were kept, not of documents."""
KEPT_NOTE = "in kept conversations: "
"""Begins the other counts that are not of documents."""
_MOST_NOTES = 40
"""Kinds that are told apart in a task."""


@dataclass
class _Batch:
    texts: list[str] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    characters: int = 0


class TaskRunner:
    """Runs tasks in this process.

    Args:
        progress: int64 [3 x tasks], shared: input bytes read, tokens written and bad records of each task. Only the
            worker that runs a task writes its entries, so no lock is held that a killed worker could leave locked.
        tokenizer: that of ``settings``.
    """

    def __init__(self, settings: WorkerSettings, progress: Any, tokenizer: TokenizerHandle) -> None:
        self._settings = settings
        self._progress = progress
        self._tokenizer = tokenizer
        self._eod_id = None if settings.eod_token is None else self._tokenizer.eod(settings.eod_token)[1]
        self._cleaner = Cleaner(
            normalize_nfc=settings.normalize_nfc,
            strip_control=settings.strip_control,
            min_chars=settings.min_chars,
            held_out=settings.held_out,
        )
        self._chat = None
        if settings.chat:
            from .chat import ChatEncoder

            self._chat = ChatEncoder(
                self._tokenizer.file,
                self._eod_id,
                settings.max_tokens,
                settings.tokenizer.allow_special_tokens,
                settings.chat_template,
                datetime.fromisoformat(settings.chat_date),
                settings.chat_bos,
            )

    def run(self, task: Task, key: str) -> TaskResult:
        """Tokenize ``task`` to the shard ``key``.

        Raises:
            UserError: from reading its files, or a record is no document and that was not allowed.
            FastPathError: see there.
        """
        reason = self._tokenizer.fallback_reason
        self._result = TaskResult(key, encoder=self._tokenizer.encoder + (f" ({reason})" if reason else ""))
        failures = self._tokenizer.fast_path_failures
        self._task = task
        self._unchecked = (
            _CHECKED_AT_START if task.index == 0 else max(_LEAST_CHECKED, task.num_bytes // _CHECKED_SHARE)
        )
        shard = Shard(self._settings.folder, key)
        done = 0
        with (
            tempfile.TemporaryDirectory(dir=self._settings.folder, prefix=f"{key}.") as scratch,
            ShardWriter(shard, self._settings, self._result) as self._shard,
        ):
            for span in task.spans:
                context = ReadContext(
                    self._refuse,
                    Path(scratch),
                    columns=self._columns(),
                    options=self._settings.reading,
                    note=self._result.notes.append,
                )
                self._source = span.file.source
                try:
                    for _ in self._run_span(span, context):
                        self._show(done + context.consumed)
                except DamagedError as error:
                    raise UserError(f"{error}; or keep what comes before with --skip-bad-lines") from error
                done += span.num_bytes
            self._result.fast_path_failures = self._tokenizer.fast_path_failures - failures
            self._shard.finish()
        self._show(task.num_bytes)
        return self._result

    def _show(self, consumed: int) -> None:
        self._progress[3 * self._task.index : 3 * self._task.index + 3] = [
            consumed,
            self._result.tokens,
            self._result.bad,
        ]

    def _columns(self) -> tuple[str, ...] | None:
        if self._chat is not None:
            return None
        roots = (name for key in self._settings.metadata for name in (key, key.partition(".")[0]))
        return tuple(dict.fromkeys((*self._settings.text.roots, *roots)))

    def _run_span(self, span: Span, context: ReadContext) -> Iterator[None]:
        """Write the documents of ``span``; comes back after each batch."""
        if self._chat is not None:
            yield from self._run_chat(span, context)
            return
        batch = _Batch()
        limit = self._settings.batch_characters
        with closing(self._texts(span, context)) as texts:
            for text, metadata in texts:
                if type(text) is LongText:
                    self._write(batch, span)
                    batch = _Batch()
                    self._write_long(text, metadata)
                    continue
                batch.texts.append(text)  # type: ignore[arg-type]
                if metadata is not None:
                    batch.metadata.append(metadata)
                batch.characters += len(text) + 1  # type: ignore[arg-type]  # + 1: empty texts fill a batch too
                if batch.characters > limit:
                    self._write(batch, span)
                    batch = _Batch()
                    yield
        self._write(batch, span)
        yield

    def _texts(self, span: Span, context: ReadContext) -> Generator[tuple[str | LongText, bytes | None], None, None]:
        """Text and metadata line of each record of ``span`` that has a text."""
        choice, metadata = self._settings.text, self._settings.metadata
        if span.file.format == "jsonl" and choice.single_key is not None and not metadata:
            texts = lines.read_texts(span, context, choice.single_key)
            for text in readable_part(texts, span.file.path, context):
                yield text, None
            return
        for record in _records(span, context):
            try:
                line = metadata_line(record.value, metadata) if metadata else None
                yield choice.text(record.value), line
            except MalformedError as error:
                context.refuse(record.where, str(error), error.kind, None)

    def _refuse(self, where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
        """Count a record that is no document, or end the run."""
        allowed = self._settings.skip_bad_lines or (kind == "invalid UTF-8" and self._settings.drop_invalid_utf8)
        if not allowed:
            raise UserError(
                f"{where.describe()}: {reason}; mend it, or leave such records out with --skip-bad-lines"
                + (" or --drop-invalid-utf8" if kind == "invalid UTF-8" else "")
            )
        if self._result.first_bad is None:
            self._result.first_bad = f"{where.describe()}: {reason}"
        if kind == UNREADABLE:
            self._result.notes.append(f"{where.describe()}: left out its unreadable rest: {reason}")
        self._result.count(self._source, kind)
        self._shard.reject(where, reason, raw)

    # ---------------------------------------------------------------------------------------------------------------
    # Writing documents

    def _write(self, batch: _Batch, span: Span) -> None:
        texts, metadata = batch.texts, batch.metadata
        if self._cleaner.active:
            cleaned = self._cleaner.clean_batch(texts)
            for _, reason in cleaned:
                if reason is not None:
                    self._result.count(self._source, reason)
            wanted = [reason is None for _, reason in cleaned]
            texts = [text for text, reason in cleaned if reason is None]
            metadata = list(itertools.compress(metadata, wanted))
        if not texts:
            return
        try:
            self._compare(texts)
            ids, lengths = self._tokenizer.encode_documents(texts, self._settings.frame)
        except UserError as error:
            self._write_one_by_one(texts, metadata, span, error)
            return
        self._shard.add(self._source, texts, ids, lengths, metadata or None)

    def _write_one_by_one(self, texts: list[str], metadata: list[bytes], span: Span, error: UserError) -> None:
        """Write documents of which the tokenizer's library refuses one or more: tiktoken gives up on some texts."""
        if len(texts) == 1:
            self._refuse(Where(span.file.path), str(error), "malformed", texts[0][:_SHOWN_CHARACTERS])
            return
        for number, text in enumerate(texts):
            self._write(_Batch([text], metadata[number : number + 1]), span)

    def _compare(self, texts: list[str]) -> None:
        """Have the reference tokenizer encode a sample too."""
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

    def _write_long(self, text: LongText, metadata: bytes | None) -> None:
        """Write one document in pieces."""

        def cleaned() -> Iterator[str]:
            for piece, reason in self._cleaner.clean_pieces(text.pieces()):
                if reason is not None:
                    raise LeftOutError(reason)
                yield piece

        def encode(piece: str) -> np.ndarray:
            return self._tokenizer.encode_flat([piece])[0]

        try:
            with self._shard.long_document(self._source, metadata, self._settings.frame) as document:
                for piece, ids in encode_in_pieces(cleaned(), encode):
                    document.add(piece, ids)
                document.end(cleaned())
        except MalformedError as error:
            self._refuse(text.where, str(error), error.kind, None)
        except LeftOutError as left_out:
            self._result.count(self._source, str(left_out))

    def _run_chat(self, span: Span, context: ReadContext) -> Iterator[None]:
        assert self._chat is not None
        for number, record in enumerate(_records(span, context)):
            try:
                if not isinstance(record.value, dict):
                    raise MalformedError("a text, not a record with a conversation")
                line = metadata_line(record.value, self._settings.metadata) if self._settings.metadata else None
                encoded = self._chat.encode(record.value)
            except MalformedError as error:
                context.refuse(record.where, str(error), error.kind, None)
                continue
            except LeftOutError as left_out:
                self._result.count(self._source, str(left_out))
                continue
            if encoded is None:
                self._result.count(self._source, "no whole turn fits --max-tokens")
                continue
            if encoded.turns_dropped:
                self._result.count(self._source, DROPPED_TURNS, encoded.turns_dropped)
            for note, number_of in encoded.notes.items():
                self._result.count_note(self._source, note, number_of)
            self._shard.add_conversation(self._source, encoded, line)
            if number % 256 == 0:
                yield
        yield


def _records(span: Span, context: ReadContext) -> Iterator[Record]:
    """The records of ``span``, up to where its file is damaged."""
    return readable_part(FORMATS[span.file.format].read(span, context), span.file.path, context)


_make_runner: Callable[[], TaskRunner]


def start_worker(settings: WorkerSettings, progress: Any) -> None:
    """Make this process a worker."""
    # Ctrl-C reaches the whole process group; the parent decides, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    global _make_runner
    # With its first task, since what it raises then reaches the parent, as what is raised here would not.
    _make_runner = functools.cache(
        lambda: TaskRunner(
            settings,
            np.frombuffer(progress, dtype=np.int64),
            load_tokenizer_once(settings.tokenizer, settings.tokenizer_sha256),
        )
    )


def run_task(task: Task, key: str) -> TaskResult:
    """Run ``task`` in a process that :func:`start_worker` has prepared."""
    return _make_runner().run(task, key)


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
