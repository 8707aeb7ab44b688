"""Writing one shard: tokens, the table of documents, and where asked masks, metadata, MinHash bands and rejects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from ...engine.data.document_frame import DocumentFrame
from ...engine.outputs import open_new
from .records import Where
from .shards import DOCUMENT, Shard

if TYPE_CHECKING:
    from .chat import EncodedChat
    from .worker import TaskResult, WorkerSettings


class ShardWriter:
    """Writes the files of ``shard``; a context manager. Without :meth:`finish` the shard is not a finished one."""

    def __init__(self, shard: Shard, settings: WorkerSettings, result: TaskResult) -> None:
        self._shard, self._settings, self._result = shard, settings, result
        self._dtype = np.dtype(settings.dtype)
        self._digest = xxhash.xxh3_128()
        self._tables: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        self._hasher = None
        if settings.minhash_threshold is not None:
            from .near_dedup import MinHasher

            self._hasher = MinHasher(settings.minhash_threshold)

    def __enter__(self) -> ShardWriter:
        self._tokens: BinaryIO = open_new(self._shard.tokens)
        self._mask: BinaryIO | None = open_new(self._shard.mask) if self._settings.chat else None
        self._metadata: BinaryIO | None = open_new(self._shard.metadata) if self._settings.metadata else None
        self._rejects: BinaryIO | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._mask, self._metadata, self._rejects):
            if file is not None:
                file.close()

    def add(
        self,
        source: int,
        texts: Sequence[str],
        ids: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        metadata: Sequence[bytes] | None,
    ) -> None:
        """Write the documents ``texts`` with tokens ``ids`` [T] and ``lengths`` [documents], but those left out."""
        keep = self._wanted(source, lengths)
        if not keep.all():
            ids = ids[np.repeat(keep, lengths)]
            lengths = lengths[keep]
            kept = keep.tolist()
            texts = [text for text, wanted in zip(texts, kept, strict=True) if wanted]
            metadata = metadata and [line for line, wanted in zip(metadata, kept, strict=True) if wanted]
        table = np.zeros(len(texts), DOCUMENT)
        table["source"], table["tokens"] = source, lengths
        table["characters"] = list(map(len, texts))
        table["text_bytes"] = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        if self._settings.digests:
            digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
            table["digest"] = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
        if self._hasher is not None:
            self._bands.append(self._hasher.bands_batch(texts))
        if metadata is not None:
            table["metadata_bytes"] = list(map(len, metadata))
        self._append(table, ids, metadata)

    def add_conversation(self, source: int, encoded: EncodedChat, metadata: bytes | None) -> None:
        """Write a conversation and its mask."""
        assert self._mask is not None
        lengths = np.array([len(encoded.ids)])
        if not self._wanted(source, lengths).all():
            return
        table = np.zeros(1, DOCUMENT)
        table["source"], table["tokens"] = source, lengths
        table["characters"], table["text_bytes"] = encoded.characters, encoded.text_bytes
        content = encoded.ids.astype("<i4").tobytes()
        if self._settings.digests:
            table["digest"] = np.frombuffer(xxhash.xxh3_128_digest(content), dtype=">u8")
        if self._hasher is not None:
            self._bands.append(self._hasher.bands_batch([" ".join(map(str, encoded.ids.tolist()))]))
        if metadata is not None:
            table["metadata_bytes"] = len(metadata)
        self._mask.write(encoded.mask.tobytes())
        self._append(table, encoded.ids, None if metadata is None else [metadata])

    @contextmanager
    def long_document(self, source: int, metadata: bytes | None, frame: DocumentFrame) -> Iterator[_LongDocument]:
        """A document that comes in pieces, with ``frame`` around it; what was written of it is taken back unless it is
        ended."""
        document = _LongDocument(self, source, metadata, frame, self._tokens.tell(), self._digest.copy())
        try:
            yield document
        finally:
            if not document.ended:
                self._take_back(document)

    def _take_back(self, document: _LongDocument) -> None:
        self._tokens.seek(document.start)
        self._tokens.truncate()
        self._digest = document.digest_before
        self._result.tokens -= document.num_tokens

    def _wanted(self, source: int, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which documents are kept by their number of tokens; the others are counted."""
        settings = self._settings
        empty, short = lengths == 0, lengths < settings.min_tokens
        long = lengths > (settings.max_tokens if settings.max_tokens is not None else np.iinfo(np.int64).max)
        for reason, where in (
            ("empty", empty),
            ("below --min-tokens", short & ~empty),
            ("above --max-tokens", long & ~empty),
        ):
            if count := int(where.sum()):
                self._result.count(source, reason, count)
        return ~(empty | short | long)

    def _append(self, table: np.ndarray, ids: npt.NDArray[np.integer], metadata: Sequence[bytes] | None) -> None:
        self._write_tokens(ids)
        if self._metadata is not None and metadata is not None:
            self._metadata.write(b"".join(metadata))
        self._tables.append(table)
        self._result.documents += len(table)

    def _write_tokens(self, ids: npt.NDArray[np.integer]) -> None:
        content = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._tokens.write(content)
        self._digest.update(content)
        self._result.tokens += len(ids)

    def reject(self, where: Where, reason: str, raw: bytes | str | None) -> None:
        """Write down a record that was skipped."""
        if self._rejects is None:
            self._rejects = open_new(self._shard.rejects)
        text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        record = {"where": where._asdict(), "reason": reason, "record": text}
        self._rejects.write(json.dumps(record).encode() + b"\n")

    def finish(self) -> None:
        """Close all files and write the result, which makes the shard a finished one."""
        with open_new(self._shard.documents) as table:
            np.save(table, np.concatenate([np.empty(0, DOCUMENT), *self._tables]))
        if self._hasher is not None:
            empty = np.empty((0, self._hasher.num_bands), np.uint64)
            with open_new(self._shard.bands) as table:
                np.save(table, np.concatenate([empty, *self._bands]))
        for file in (self._tokens, self._mask, self._metadata, self._rejects):
            if file is not None:
                file.flush()
        self._result.tokens_xxh3_128 = self._digest.hexdigest()
        self._result.sizes = self._shard.sizes()
        temporary = self._shard.result.with_suffix(".unfinished")
        with open_new(temporary) as record:
            record.write(self._result.to_json().encode())
        os.replace(temporary, self._shard.result)


class _LongDocument:
    """One document on its way into a shard, piece by piece."""

    def __init__(
        self,
        writer: ShardWriter,
        source: int,
        metadata: bytes | None,
        frame: DocumentFrame,
        start: int,
        digest_before: xxhash.xxh3_128,
    ) -> None:
        self.start, self.digest_before, self.ended = start, digest_before, False
        self._writer, self._source, self._metadata, self._frame = writer, source, metadata, frame
        self._last_ids = np.empty(0, np.int32)
        self._table = np.zeros(1, DOCUMENT)
        self._text_digest = xxhash.xxh3_128()

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return int(self._table["tokens"][0])

    def add(self, text: str, ids: npt.NDArray[np.int32]) -> None:
        """Write the next piece."""
        content = text.encode()
        self._text_digest.update(content)
        self._table["characters"] += len(text)
        self._table["text_bytes"] += len(content)
        if len(ids):
            if self.num_tokens == 0:
                self._write(self._frame.missing_prefix(ids))
            self._write(ids)
            self._last_ids = ids

    def _write(self, ids: npt.ArrayLike) -> None:
        array = np.asarray(ids, np.int32)
        self._table["tokens"] += len(array)
        self._writer._write_tokens(array)

    def end(self, pieces: Iterator[str]) -> None:
        """Write the document's end, if its length is wanted; ``pieces`` are its text once more, read where needed."""
        writer = self._writer
        if self.num_tokens:
            self._write(self._frame.missing_suffix(self._last_ids))
        if not writer._wanted(self._source, self._table["tokens"]).all():
            return
        self._table["source"] = self._source
        if writer._settings.digests:
            self._table["digest"] = np.frombuffer(self._text_digest.digest(), dtype=">u8")
        if writer._hasher is not None:
            writer._bands.append(writer._hasher.bands_of_pieces(pieces)[None])
        if self._metadata is not None:
            self._table["metadata_bytes"] = len(self._metadata)
        writer._append(self._table, np.empty(0, np.int32), None if self._metadata is None else [self._metadata])
        self.ended = True
