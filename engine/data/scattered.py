"""Present sequences that are not in file order as one stream, in the order of the index.

An index may list any sequences of .bin in any order: filtered, permuted, or repeated. Megatron-LM reads each by its
pointer and length. Here they form one stream of tokens, as for an index in file order, so that chunks, layouts and
masks work alike. Memory: 8 bytes for every 1,024 sequences.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from .file_entries import FileEntries

_BLOCK = 1024
_BLOCKS_CACHED = 256


class ScatteredSequences:
    """The beginnings of sequences in the stream, in bytes, and the places of its tokens in .bin.

    Has the searches of :class:`AscendingEntries`. Safe to use from several threads.

    Args:
        lengths: [N] tokens in each sequence, not negative.
        pointers: [N] byte offset of each in .bin, all multiples of ``itemsize``.
        itemsize: bytes of a token.
    """

    def __init__(self, lengths: FileEntries, pointers: FileEntries, itemsize: int) -> None:
        self._lengths, self._pointers, self._itemsize = lengths, pointers, itemsize
        sums = [0]
        for first in range(0, len(lengths), 64 * _BLOCK):
            some = lengths[first : first + 64 * _BLOCK]
            sums += np.add.reduceat(some, np.arange(0, len(some), _BLOCK), dtype=np.int64).tolist()
        self._block_starts = np.cumsum(np.array(sums, dtype=np.int64)) * itemsize
        self._starts = functools.lru_cache(maxsize=_BLOCKS_CACHED)(self._read_starts)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return int(self._block_starts[-1]) // self._itemsize

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> int:
        return int(self._starts(index // _BLOCK)[index % _BLOCK])

    def first_at_least(self, value: int) -> int:
        """Return the number of the first sequence that begins at ``value`` or later; N if there is none."""
        block = int(self._block_starts[:-1].searchsorted(value))
        return (block - 1) * _BLOCK + int(self._starts(block - 1).searchsorted(value)) if block else 0

    def between(self, low: int, high: int) -> npt.NDArray[np.int64]:
        """Return the beginnings that are >= ``low`` and < ``high``."""
        first = self.first_at_least(low)
        last = max(first, self.first_at_least(high))
        blocks = range(first // _BLOCK, -(-last // _BLOCK))
        parts = [self._starts(block) for block in blocks]
        return np.concatenate(parts)[first - blocks.start * _BLOCK :][: last - first] if parts else np.empty(0, "i8")

    def runs(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return [runs, 2], the ranges of tokens in .bin that make up the tokens [``start``, ``stop``) of the
        stream.
        """
        low, high = start * self._itemsize, stop * self._itemsize
        if low == high:
            return np.empty((0, 2), dtype=np.int64)
        first, last = self.first_at_least(low + 1) - 1, self.first_at_least(high)
        begins = self._pointers[first:last].astype(np.int64)
        ends = begins + self._lengths[first:last] * np.int64(self._itemsize)
        past = self[last - 1] + int(ends[-1] - begins[-1]) - high
        begins[0] += low - self[first]
        ends[-1] -= past
        filled = ends > begins
        begins, ends = begins[filled], ends[filled]
        breaks = np.flatnonzero(begins[1:] != ends[:-1])
        whole = np.stack((begins[np.append(0, breaks + 1)], ends[np.append(breaks, len(ends) - 1)]), axis=1)
        return whole // self._itemsize

    def _read_starts(self, block: int) -> npt.NDArray[np.int64]:
        sizes = self._lengths[block * _BLOCK : (block + 1) * _BLOCK] * np.int64(self._itemsize)
        return self._block_starts[block] + np.cumsum(sizes) - sizes
