"""A shuffle of documents in bounded memory, whose order depends on the seed and on nothing else.

The i-th document (of those that are shuffled, in input order) has the key mix(i + c(seed)), a keyed bijection of 64-bit
words, and the order is that of the keys. Documents go to one of 2^b buckets on disk by the first b bits of their keys, so
that the buckets one after another, each sorted in memory, are the order for any b.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...engine.data.dataset_writer import FileRange
from .hashing import GOLDEN, mix64_of

Buffer = bytes | memoryview | npt.NDArray

_MAX_BUCKET_BITS = 14
_MIN_JOINED = 64  # bytes: longer pieces are copied one by one, shorter ones by an index of all bytes


@dataclass(frozen=True)
class ShuffledDocuments:
    """Consecutive documents of the final order."""

    lengths: dict[str, npt.NDArray[np.int64]]
    """For each column int64[documents], bytes."""
    data: dict[str, memoryview]
    """For each column the documents' bytes end to end. Valid until the next documents are asked for."""
    payload: npt.NDArray | None
    """[documents], what was given to :meth:`ExternalShuffle.add`."""


class ExternalShuffle:
    """Takes documents in input order and gives them back in the order of their keys.

    A context manager; ``folder`` must not exist before, and is removed afterwards. The disk takes as much as the
    documents; each bucket's part is given back as soon as it has been read. Memory is bounded by ``memory_bytes``, 50
    bytes for each document of a shard and, besides, mapped files, of which one document may be as large as it likes.

    Args:
        folder: for the buckets.
        seed: any integer; its lowest 64 bits count.
        total_bytes: of all columns of all documents, about; a wrong number costs time or memory, nothing else.
        columns: names of the parts of a document that are kept apart.
        memory_bytes: what is held at once, about.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        total_bytes: int,
        columns: Sequence[str] = ("tokens",),
        memory_bytes: int = 256 << 20,
    ) -> None:
        self._folder = folder
        self._columns = tuple(columns)
        self._batch_bytes = max(memory_bytes // 4, 1)
        self._bits = min(max(total_bytes // self._batch_bytes, 0).bit_length(), _MAX_BUCKET_BITS)
        self._key = mix64_of(seed + GOLDEN)
        self._num_documents = 0
        self._record: np.dtype | None = None
        self._waiting: dict[int, list[list[Buffer]]] = {}
        self._waiting_bytes = 0

    def __enter__(self) -> ExternalShuffle:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        lengths: Mapping[str, npt.NDArray[np.int64]],
        data: Mapping[str, FileRange | Buffer],
        keep: npt.NDArray[np.bool_] | None = None,
        payload: npt.NDArray | None = None,
    ) -> None:
        """Take the next documents.

        Args:
            lengths: for each column int64[documents], bytes.
            data: for each column the bytes of all documents end to end.
            keep: bool[documents], those that are shuffled; None: all.
            payload: [documents] of any dtype without objects, the same in each call: given back with the documents.

        Raises:
            ValueError: a column's data are not as long as its lengths say.
        """
        count = len(lengths[self._columns[0]])
        kept = np.arange(count) if keep is None else np.flatnonzero(keep)
        keys = self._keys(len(kept))
        order = np.argsort(keys >> np.uint64(64 - self._bits) if self._bits else keys, kind="stable")
        kept, keys = kept[order], keys[order]
        records = np.empty(len(kept), self._record_type(payload))
        records["key"] = keys
        records["lengths"] = np.stack([lengths[name][kept] for name in self._columns], axis=1)
        if payload is not None:
            records["payload"] = payload[kept]
        starts = {name: np.cumsum(lengths[name]) - lengths[name] for name in self._columns}
        with _opened({name: data[name] for name in self._columns}) as views:
            for name, view in views.items():
                if len(view) != lengths[name].sum():
                    raise ValueError(f"{name}: {len(view)} bytes, but the documents' lengths sum to {lengths[name].sum()}")
            for first, last in _batches(records["lengths"].sum(axis=1), self._batch_bytes):
                pieces: list[Buffer] = [
                    gather(views[name], starts[name][kept[first:last]], lengths[name][kept[first:last]])
                    for name in self._columns
                ]
                self._wait(records[first:last], pieces)
                # One that is larger than memory is a view of the file.
                if self._waiting_bytes >= self._batch_bytes:
                    self._flush()
            self._flush()

    def drain(self) -> Iterator[ShuffledDocuments]:
        """All documents in order, a fourth of ``memory_bytes`` or one document at a time. Nothing may be added then."""
        for bucket in range(1 << self._bits):
            path = self._path(bucket, "records")
            if not path.exists():
                continue
            assert self._record is not None
            records = np.fromfile(path, self._record)
            order = np.argsort(records["key"])
            starts = np.cumsum(records["lengths"], axis=0) - records["lengths"]
            parts = {
                name: FileRange(part, 0, part.stat().st_size)
                for name in self._columns
                if (part := self._path(bucket, name))
            }
            records, starts = records[order], starts[order]
            with _opened(parts) as views:
                for first, last in _batches(records["lengths"].sum(axis=1), self._batch_bytes):
                    rows = records[first:last]
                    lengths = {name: rows["lengths"][:, i].copy() for i, name in enumerate(self._columns)}
                    data = {
                        name: memoryview(gather(views[name], starts[first:last, i], lengths[name]))
                        for i, name in enumerate(self._columns)
                    }
                    payload = rows["payload"].copy() if "payload" in rows.dtype.names else None
                    yield ShuffledDocuments(lengths, data, payload)
                    del data
            path.unlink()
            for part_range in parts.values():
                os.unlink(part_range.path)
