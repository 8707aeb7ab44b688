"""A shuffle of documents in bounded memory, whose order depends on the seed and on nothing else.

The i-th document (of those that are shuffled, in input order) has the key mix(i + c(seed)), a keyed bijection of 64-bit
words, and the order is that of the keys. Documents go to one of 2^b buckets on disk by the first b bits of their keys,
so that the buckets one after another, each sorted in memory, are the order for any b.
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
_JOINED = 4096  # documents: as many slices exist at once, each of which takes 200 bytes


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
    documents and 16 to 32 bytes for each; each bucket's part is given back as soon as it has been read. Memory is
    bounded by ``memory_bytes``, 100 bytes for each document of one call or one bucket and, besides, mapped files, of
    which one document may be as large as it likes. One file is open at a time.

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
        payload: npt.NDArray | None = None,
    ) -> None:
        """Take the next documents.

        Args:
            lengths: for each column int64[documents], bytes.
            data: for each column the bytes of all documents end to end; free to change afterwards.
            keep: bool[documents], those that are shuffled; None: all.
            payload: [documents] of any dtype without objects, the same in each call: given back with the documents.

        Raises:
            ValueError: a column's data are not as long as its lengths say.
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
        records = np.empty(len(kept), self._record_type(payload))
        records["key"] = keys[order]
        records["lengths"] = np.stack([lengths[name][kept] for name in self._columns], axis=1)
        if payload is not None:
            records["payload"] = payload[kept]
        starts = {name: (np.cumsum(lengths[name]) - lengths[name])[kept] for name in self._columns}
        for first, last, size in _batches(records, self._batch_bytes):
            # A document that is larger than memory stays a view of its file, and is written at once.
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
        """All documents in order, a fourth of ``memory_bytes`` or one document at a time. Nothing may be added then."""
        self._flush()
        for bucket in range(1 << self._bits):
            path = self._path(bucket, "records")
            if not path.exists():
                continue
            assert self._record is not None
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
                payload = rows["payload"].copy() if "payload" in (records.dtype.names or ()) else None
                yield ShuffledDocuments(lengths, data, payload)
                del data
            del views
            for used in (path, *parts):
                used.unlink()

    def _keys(self, count: int) -> npt.NDArray[np.uint64]:
        """uint64[count] of the next documents."""
        numbers = np.arange(self._num_documents, self._num_documents + count, dtype=np.uint64)
        self._num_documents += count
        return mix64(numbers + np.uint64(self._key))

    def _bucket_of(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        # In two steps, because one of 64 bits is none.
        return (keys >> np.uint64(1)) >> np.uint64(63 - self._bits)

    def _record_type(self, payload: npt.NDArray | None) -> np.dtype:
        """What is kept of a document beside its bytes."""
        fields: list[tuple] = [("key", "<u8"), ("lengths", "<i8", (len(self._columns),))]
        if payload is not None:
            fields.append(("payload", payload.dtype, payload.shape[1:]))
        record = np.dtype(fields)
        assert self._record is None or record == self._record, "payloads of one dtype, in all calls or in none"
        self._record = record
        return record

    def _path(self, bucket: int, column: str) -> Path:
        return self._folder / f"{bucket:05d}.{column}"

    def _flush(self) -> None:
        """Append what waits to its buckets."""
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
    """The bytes of documents, end to end.

    Args:
        view: uint8[bytes], where they lie.
        starts: int64[documents], offsets in ``view``.
        lengths: int64[documents], bytes.
        copy: if not, there is one document, and what is returned is a part of ``view``.
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
    """Runs [first, last) of documents, and their bytes with their records': one, or as many as fit ``limit``."""
    ends = np.concatenate([[0], np.cumsum(records["lengths"].sum(axis=1) + records.dtype.itemsize)])
    first = 0
    while first < len(records):
        last = max(int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1, first + 1)
        yield first, last, int(ends[last] - ends[first])
        first = last


def _view(data: FileRange | Buffer) -> npt.NDArray[np.uint8]:
    """uint8[bytes]; of a file mapped, until nothing refers to it any more."""
    if not isinstance(data, FileRange):
        return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    size = data.stop - data.start
    if size == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(data.path, np.uint8, mode="r", offset=data.start, shape=(size,)))
