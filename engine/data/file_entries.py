"""Numbers in a file, read where they lie, and finding a place among ascending ones with a few reads.

Why not a memory map: its page faults read around the place that is asked for (``read_ahead_kb`` of the disk, often
128 KiB and here and there 8 MiB), which for random access is up to hundreds of times what is needed, from the disk and
of the page cache; its pages count as memory of the process; and a disk that fails ends the process by a signal. One
``pread`` reads one window of tokens in one go, and fails with an error that names the file.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from typing import overload

import numpy as np
import numpy.typing as npt

from ..errors import UserError

_BLOCK = 512
"""Entries read at a guess: two pages, the least that disks and file systems read anyway."""
_GUESSES = 8


class FileEntries:
    """A one-dimensional array in a file, read-only. May be used from several threads and after ``fork``.

    Args:
        path: of the file.
        dtype: of an entry.
        offset: of the first entry, in bytes.
        count: of entries; all of them must be there.

    Raises:
        UserError: when the file can no longer be read, or has become shorter.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: npt.DTypeLike, offset: int, count: int) -> None:
        self._path, self._dtype, self._offset, self._count = path, np.dtype(dtype), offset, count
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> npt.NDArray[np.integer]: ...
    def __getitem__(self, index: int | slice) -> int | npt.NDArray[np.integer]:
        """An entry, or a copy of some that follow one another (read-only, aligned, in the file's dtype)."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._count)
            return self._read(start, max(stop - start, 0))
        return int(self._read(index, 1)[0])

    def _read(self, start: int, count: int) -> npt.NDArray[np.integer]:
        place, size = self._offset + start * self._dtype.itemsize, count * self._dtype.itemsize
        raw = self._read_bytes(place, size)
        while len(raw) < size:  # one call reads at most 2 GiB, and a signal may cut it short
            more = self._read_bytes(place + len(raw), size - len(raw))
            if not more:
                raise UserError(
                    f"{self._path}: ends at byte {place + len(raw):,}, but was longer when it was opened: somebody "
                    "is writing to it or has cut it; build or copy the dataset again"
                )
            raw += more
        return np.frombuffer(raw, self._dtype)

    def _read_bytes(self, place: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, place)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read at byte {place:,}: {error.strerror}") from error


def first_at_least(entries: FileEntries, value: int, end: int) -> int:
    """Number of the first of the ascending ``entries`` that is >= ``value``, or their count where there is none.

    Args:
        entries: integers >= 0.
        value: what is looked for.
        end: a bound on all entries.
    """
    first, block = _block_with(entries, value, end)
    return first + int(block.searchsorted(value))


def entries_between(entries: FileEntries, low: int, high: int, end: int) -> npt.NDArray[np.int64]:
    """Those of the ascending ``entries`` that are >= ``low`` and < ``high``; ``end`` as for :func:`first_at_least`."""
    first, block = _block_with(entries, low, end)
    begin, stop = block.searchsorted((low, high)).tolist()
    parts = [block[begin:stop]]
    while stop == len(block) and first + stop < len(entries):
        first += len(block)
        block = entries[first : first + 8 * _BLOCK]
        stop = int(block.searchsorted(high))
        parts.append(block[:stop])
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)


def _block_with(entries: FileEntries, value: int, end: int) -> tuple[int, npt.NDArray[np.integer]]:
    """Some entries, and the number of the first of them, among or right behind which the first >= ``value`` stands.

    Interpolation search (Perl, Itai and Avni, 1978): among entries at random distances a guess is a few thousand
    entries wrong, the next one less than a block, so that two reads mostly suffice where bisection has some twenty.
    After ``_GUESSES`` guesses, which distances that differ much from one region to the next may need, it is bisection.
    """
    low, high, least, most = 0, len(entries), 0, end  # the place lies in [low, high], its entry in [least, most]
    for _ in range(_GUESSES):
        if high - low <= _BLOCK:
            break
        guess = low + (value - least) * (high - low) // max(1, most - least)
        first = min(max(low, guess - _BLOCK // 2), high - _BLOCK)
        block = entries[first : first + _BLOCK]
        if block[0] >= value:
            high, most = first, int(block[0])
        elif block[-1] < value:
            low, least = first + _BLOCK, int(block[-1])
        else:
            return first, block
    if high - low > _BLOCK:
        low = high = bisect_left(entries, value, lo=low, hi=high)
    return low, entries[low : high + 1]
