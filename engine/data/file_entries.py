"""Read numbers from a file at given places, and search ascending ones with few reads.

A memory map is not used for three reasons. Its page faults read around the requested place (``read_ahead_kb`` of the
disk, often 128 KiB, sometimes 8 MiB); for random access this is up to hundreds of times the needed amount, from the
disk and in the page cache. Its pages count as memory of the process. A failing disk ends the process by a signal. One
``pread`` reads one window of tokens, and fails with an error that names the file.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from typing import overload

import numpy as np
import numpy.typing as npt

from ..errors import UserError

_BLOCK = 512
"""Entries of a speculative read: two pages, the least that disks and file systems read anyway."""
_SEEN = 4096
"""Entries of an array to remember: half a megabyte."""


class FileEntries:
    """A read-only one-dimensional array in a file. May be used from several threads and after ``fork``.

    Args:
        path: of the file.
        dtype: of an entry.
        offset: of the first entry, in bytes.
        count: of entries; the file must hold all of them.

    Raises:
        UserError: the file can no longer be read, or has become shorter.
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
        """Return one entry, or a copy of consecutive entries (read-only, aligned, in the file's dtype)."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._count)
            return self._read(start, max(stop - start, 0))
        return int(self._read(index, 1)[0])

    def _read(self, start: int, count: int) -> npt.NDArray[np.integer]:
        place, size = self._offset + start * self._dtype.itemsize, count * self._dtype.itemsize
        raw = self._read_bytes(place, size)
        while len(raw) < size:  # one call reads at most 2 GiB, and a signal may interrupt it
            more = self._read_bytes(place + len(raw), size - len(raw))
            if not more:
                raise UserError(
                    f"{self._path}: ends at byte {place + len(raw):,}, but was longer when it was opened: another "
                    "process writes to it or has truncated it; build or copy the dataset again"
                )
            raw += more
        return np.frombuffer(raw, self._dtype)

    def _read_bytes(self, place: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, place)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read at byte {place:,}: {error.strerror}") from error


class AscendingEntries(FileEntries):
    """Ascending integers >= 0, possibly with repetitions, with fast searches.

    Uses interpolation search (Perl, Itai and Avni, 1978). With random distances between entries the first guess is a
    few thousand entries off, and the next less than a block, so two reads suffice. If distances differ between regions,
    a guess may be far off. Then a bisection follows, so that there are never more than twice its reads. Entries seen by
    earlier searches narrow the later ones.

    Args:
        end: a bound on all entries, used for the first guess.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: npt.DTypeLike, offset: int, count: int, end: int) -> None:
        super().__init__(path, dtype, offset, count)
        self._end = end
        self._seen: list[tuple[int, int]] = []  # entries and their numbers, ascending; insertions are atomic

    def first_at_least(self, value: int) -> int:
        """Return the number of the first entry >= ``value``, or the count of entries if there is none."""
        first, block = self._block_with(value)
        return first + int(block.searchsorted(value))

    def between(self, low: int, high: int) -> npt.NDArray[np.int64]:
        """Return the entries that are >= ``low`` and < ``high``."""
        first, block = self._block_with(low)
        begin, stop = block.searchsorted((low, high)).tolist()
        parts = [block[begin:stop]]
        while stop == len(block) and first + stop < len(self):
            first += len(block)
            block = self[first : first + 8 * _BLOCK]
            stop = int(block.searchsorted(high))
            parts.append(block[:stop])
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)

    def _block_with(self, value: int) -> tuple[int, npt.NDArray[np.integer]]:
        """Return entries among which the first one >= ``value`` is, if there is any, and the number of their first
        one.
        """
        # The place is in [low, high], the entry there in [least, most].
        low, high, least, most = 0, len(self), 0, self._end
        place = bisect_left(self._seen, (value, -1))
        if place:
            least, low = self._seen[place - 1]
            low += 1
        if place < len(self._seen):
            most, high = self._seen[place]
        halve = False
        while high - low > _BLOCK:
            width = high - low
            guess = low + (width // 2 if halve else (value - least) * width // max(1, most - least))
            first = min(max(low, guess - _BLOCK // 2), high - _BLOCK)
            block = self[first : first + _BLOCK]
            begin, end = int(block[0]), int(block[-1])
            if len(self._seen) < _SEEN:
                insort(self._seen, (begin, first))
                insort(self._seen, (end, first + _BLOCK - 1))
            if begin >= value:
                high, most = first, begin
            elif end < value:
                low, least = first + _BLOCK, end
            else:
                return first, block
            halve = not halve and 2 * (high - low) > width
        return low, self[low : high + 1]
