"""Shuffles documents in bounded memory. The order depends only on the seed.

The i-th kept document, in input order, has the key mix(i + c(seed)), a keyed bijection of 64-bit words, and documents
are sorted by key. They go to 2^b buckets on disk by the first b bits of their keys; the buckets in order, each sorted
in memory, give the same order for any b.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....engine.data.splitmix import GOLDEN, mix64, mix64_of
from ..dataset_writer import FileRange

Buffer = bytes | memoryview | npt.NDArray

_MAX_BUCKET_BITS = 14
_JOINED = 4096  # documents whose slices, of 200 bytes each, exist at once


@dataclass(frozen=True)
class ShuffledDocuments:
    """Consecutive documents of the final order."""

    lengths: dict[str, npt.NDArray[np.int64]]
    """int64[documents] for each column: bytes."""
    data: dict[str, memoryview]
    """The documents' bytes end to end for each column. Valid until the next iteration."""


class ExternalShuffle:
    """Takes documents in input order and returns them in the order of their keys.

    A context manager; it creates ``folder`` and removes it. The disk takes the size of the documents and 16 to 32 bytes
    per document; a bucket is deleted when it has been read. Memory is bounded by ``memory_bytes``, 100 bytes per
    document of a call or bucket, and mapped files. A document may have any size. One file is open at a time.

    Args:
        folder: for the buckets.
        seed: any integer; its lowest 64 bits count.
        total_bytes: estimate for all documents; a wrong one costs only time or memory.
        columns: the parts of a document.
        memory_bytes: about what is held at once.
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
        self._record = np.dtype([("key", "<u8"), ("lengths", "<i8", (len(self._columns),))])
        self._waiting: list[tuple[np.ndarray, dict[str, npt.NDArray[np.uint8]]]] = []
        self._waiting_bytes = 0

    def __enter__(self) -> ExternalShuffle:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        lengths: Mapping[str, npt.NDArray[np.int64]],
        data: Mapping[str, FileRange | Buffer],
        keep: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Add the next documents.

        Args:
            lengths: int64[documents] for each column: bytes.
            data: the bytes of all documents end to end for each column; may change afterwards.
            keep: bool[documents], those to shuffle; None: all.

        Raises:
            ValueError: a column's data do not have the size of its lengths.
        """
        views = {name: _view(data[name]) for name in self._columns}
        for name, view in views.items():
            if len(view) != lengths[name].sum():
                raise ValueError(f"{name}: {len(view)} bytes, but the documents' lengths sum to {lengths[name].sum()}")
        count = len(lengths[self._columns[0]])
        kept = np.arange(count) if keep is None else np.flatnonzero(keep)
        keys = self._keys(len(kept))
        order = np.argsort(self._bucket_of(keys), kind="stable")
        kept = kept[order]
        records = np.empty(len(kept), self._record)
        records["key"] = keys[order]
        records["lengths"] = np.stack([lengths[name][kept] for name in self._columns], axis=1)
        starts = {name: (np.cumsum(lengths[name]) - lengths[name])[kept] for name in self._columns}
        for first, last, size in _batches(records, self._batch_bytes):
            # A document larger than memory stays a view of its file, and is written at once.
            pieces = {
                name: gather(
                    views[name], starts[name][first:last], lengths[name][kept[first:last]], size <= self._batch_bytes
                )
                for name in self._columns
            }
            self._waiting.append((records[first:last].copy(), pieces))
            self._waiting_bytes += size
            if self._waiting_bytes >= self._batch_bytes:
                self._flush()

    def drain(self) -> Iterator[ShuffledDocuments]:
        """Yield all documents in order, a fourth of ``memory_bytes`` or one document at a time. Ends adding."""
        self._flush()
        for bucket in range(1 << self._bits):
            path = self._path(bucket, "records")
            if not path.exists():
                continue
            records = np.fromfile(path, self._record)
            order = np.argsort(records["key"])
            starts = (np.cumsum(records["lengths"], axis=0) - records["lengths"])[order]
            records = records[order]
            parts = [self._path(bucket, name) for name in self._columns]
            views = [_view(FileRange(part, 0, part.stat().st_size)) for part in parts]
            for first, last, size in _batches(records, self._batch_bytes):
                rows = records[first:last]
                lengths = {name: rows["lengths"][:, i].copy() for i, name in enumerate(self._columns)}
                data = {
                    name: gather(views[i], starts[first:last, i], lengths[name], size <= self._batch_bytes).data
                    for i, name in enumerate(self._columns)
                }
                yield ShuffledDocuments(lengths, data)
                del data
            del views
            for used in (path, *parts):
                used.unlink()

    def _keys(self, count: int) -> npt.NDArray[np.uint64]:
        """Return the keys uint64[count] of the next documents."""
        numbers = np.arange(self._num_documents, self._num_documents + count, dtype=np.uint64)
        self._num_documents += count
        return mix64(numbers + np.uint64(self._key))

    def _bucket_of(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        # Two shifts, because a shift by 64 bits is undefined.
        return (keys >> np.uint64(1)) >> np.uint64(63 - self._bits)

    def _path(self, bucket: int, column: str) -> Path:
        return self._folder / f"{bucket:05d}.{column}"

    def _flush(self) -> None:
        """Append the waiting documents to their buckets."""
        runs: dict[int, list[tuple[int, int, int]]] = {}
        ends = []
        for number, (records, _) in enumerate(self._waiting):
            buckets = self._bucket_of(records["key"])
            firsts = np.flatnonzero(np.concatenate([[True], buckets[1:] != buckets[:-1]]))
            lasts = np.append(firsts[1:], len(records))
            for bucket, *run in zip(buckets[firsts].tolist(), firsts.tolist(), lasts.tolist(), strict=True):
                runs.setdefault(bucket, []).append((number, *run))
            ends.append(np.concatenate([np.zeros_like(records["lengths"][:1]), np.cumsum(records["lengths"], axis=0)]))
        for bucket, parts in runs.items():
            with open(self._path(bucket, "records"), "ab") as file:
                for number, first, last in parts:
                    file.write(self._waiting[number][0][first:last].tobytes())
            for i, name in enumerate(self._columns):
                with open(self._path(bucket, name), "ab") as file:
                    for number, first, last in parts:
                        start, stop = ends[number][[first, last], i]
                        file.write(self._waiting[number][1][name][start:stop].data)
        self._waiting, self._waiting_bytes = [], 0


def gather(
    view: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], copy: bool = True
) -> npt.NDArray[np.uint8]:
    """Return the bytes of documents end to end.

    Args:
        view: uint8[bytes] that contains them.
        starts: int64[documents], offsets in ``view``.
        lengths: int64[documents], bytes.
        copy: if False, there is one document, and a part of ``view`` is returned.
    """
    stops = starts + lengths
    if not copy:
        (start,), (stop,) = starts.tolist(), stops.tolist()
        return view[start:stop]
    result = np.empty(int(lengths.sum()), np.uint8)
    whole = view.data
    done = 0
    for first in range(0, len(starts), _JOINED):
        pairs = zip(starts[first : first + _JOINED].tolist(), stops[first : first + _JOINED].tolist(), strict=True)
        joined = b"".join([whole[start:stop] for start, stop in pairs])
        result[done : done + len(joined)] = np.frombuffer(joined, np.uint8)
        done += len(joined)
    return result


def _batches(records: np.ndarray, limit: int) -> Iterator[tuple[int, int, int]]:
    """Yield runs [first, last) of documents, as many as fit ``limit`` but at least one, and their bytes."""
    ends = np.concatenate([[0], np.cumsum(records["lengths"].sum(axis=1) + records.dtype.itemsize)])
    first = 0
    while first < len(records):
        last = max(int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1, first + 1)
        yield first, last, int(ends[last] - ends[first])
        first = last


def _view(data: FileRange | Buffer) -> npt.NDArray[np.uint8]:
    """Return uint8[bytes]; a file is mapped while something refers to it."""
    if not isinstance(data, FileRange):
        return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    size = data.stop - data.start
    if size == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(data.path, np.uint8, mode="r", offset=data.start, shape=(size,)))
