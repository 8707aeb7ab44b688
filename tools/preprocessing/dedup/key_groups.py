"""Finds items with equal keys in bounded memory, for both kinds of deduplication."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(earlier, later): int64[pairs] each, indices of items with equal keys, earlier < later."""

_BUCKET_BITS = 10
_KEY_BITS = 64
_BYTES_PER_ITEM = 120  # with two words of key: the items, their order, and copies in that order


class KeyGroups:
    """Finds for each item, except the first of its key, an earlier item with the same key.

    Items wait in memory. When it is full, repeated keys are paired, and one item of each key goes to a file, chosen by
    the first bits of the key. At the end each file is solved alone. However often a key occurs, it takes at most one
    item of a file for each time that memory was full.

    Args:
        folder: for files; created when needed.
        words: 64-bit words of a key.
        memory_bytes: bound on what is held.
        shift: leading bits of a key that all items have in common.
    """

    def __init__(self, folder: str | Path, words: int, memory_bytes: int, shift: int = 0) -> None:
        self._folder, self._words, self._memory_bytes, self._shift = folder, words, memory_bytes, shift
        self._capacity = max(memory_bytes // _BYTES_PER_ITEM, 1)
        self._item = np.dtype([("key", "<u8", (words,)), ("index", "<i8")])
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._spilled = False

    def add(self, keys: npt.NDArray[np.uint64], indices: npt.NDArray[np.int64]) -> Iterator[Pairs]:
        """Add items in any order; yield the pairs found so far.

        Args:
            keys: uint64[items, words], with a uniformly distributed first word, as of hashes.
            indices: int64[items].
        """
        for start in range(0, len(keys), self._capacity):
            items = np.empty(min(self._capacity, len(keys) - start), self._item)
            items["key"] = keys[start : start + self._capacity]
            items["index"] = indices[start : start + self._capacity]
            if self._num_waiting + len(items) > self._capacity:
                yield self._spill()
            self._waiting.append(items)
            self._num_waiting += len(items)

    def end(self) -> Iterator[Pairs]:
        """Yield the remaining pairs, and remove the files."""
        if not self._spilled:
            yield self._settle()[1]
            return
        yield self._spill()
        for bucket in range(1 << _BUCKET_BITS):
            path = self._path(bucket)
            if os.path.exists(path):
                yield from self._solve(path)
                os.unlink(path)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _solve(self, path: str) -> Iterator[Pairs]:
        count = os.path.getsize(path) // self._item.itemsize
        shift = self._shift + _BUCKET_BITS
        # Items with an equal first word have one key, nearly always.
        memory_bytes = self._memory_bytes if shift < _KEY_BITS else count * _BYTES_PER_ITEM
        groups = KeyGroups(f"{path}.parts", self._words, memory_bytes, shift)
        with open(path, "rb") as file:
            while len(items := np.fromfile(file, self._item, groups._capacity)):
                yield from groups.add(items["key"], items["index"])
        yield from groups.end()

    def _path(self, bucket: int) -> str:
        # Not a Path: each one interns its name, and Python's table of interned names may grow by megabytes at that.
        return os.path.join(self._folder, f"{bucket:04d}.items")

    def _settle(self) -> tuple[np.ndarray, Pairs]:
        """Empty the memory; return the first item of each key, by key, and its pairs with the others."""
        items = np.concatenate([np.empty(0, self._item), *self._waiting])
        self._waiting, self._num_waiting = [], 0
        keys = items["key"]
        order = np.argsort(keys[:, 0])
        ordered = keys[order]
        equal = ordered[1:] == ordered[:-1]
        if (equal[:, 0] & ~equal.all(axis=1)).any():
            order = np.lexsort(keys.T[::-1])
            ordered = keys[order]
            equal = ordered[1:] == ordered[:-1]
        indices = items["index"][order]
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(items), 1), np.bool_), ~equal.all(axis=1)]))
        sizes = np.diff(starts, append=len(items))
        first = np.minimum.reduceat(indices, starts) if len(starts) else indices
        firsts = np.repeat(first, sizes)
        later = indices != firsts
        survivors = np.empty(len(starts), self._item)
        survivors["key"], survivors["index"] = ordered[starts], first
        return survivors, (firsts[later], indices[later])

    def _spill(self) -> Pairs:
        """Move the items in memory to the files; return the pairs."""
        os.makedirs(self._folder, exist_ok=True)
        self._spilled = True
        survivors, pairs = self._settle()
        buckets = (survivors["key"][:, 0] << np.uint64(self._shift)) >> np.uint64(_KEY_BITS - _BUCKET_BITS)
        edges = np.searchsorted(buckets, np.arange((1 << _BUCKET_BITS) + 1, dtype=np.uint64))
        for bucket in np.flatnonzero(np.diff(edges)).tolist():
            with open(self._path(bucket), "ab") as file:
                survivors[edges[bucket] : edges[bucket + 1]].tofile(file)
        return pairs


class GrowingArray:
    """A writable array in a file that can be extended at its end. Unused pages may leave the memory."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        path.touch(exist_ok=False)

    def append(self, values: npt.NDArray) -> None:
        """Add ``values`` [n] at the end."""
        with open(self._path, "ab") as file:
            file.write(np.ascontiguousarray(values, dtype=self._dtype).data)

    def map(self) -> npt.NDArray:
        """Map the array so far, for reading and writing."""
        if not self._path.stat().st_size:
            return np.empty(0, self._dtype)
        return np.memmap(self._path, self._dtype, mode="r+")
