"""Files that are hashed while they are written, and copied by the kernel where the content is in another file."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from ...engine.files.atomic import sync_file
from ...engine.files.outputs import open_new

_BLOCK_BYTES = 2 << 20
"""Bytes copied and then hashed while they are in the processor's cache. A multiple of every token size."""


@dataclass(frozen=True)
class FileRange:
    """The bytes [start, stop) of a file."""

    path: str | os.PathLike[str]
    start: int
    stop: int
    on_block: Callable[[memoryview], None] | None = None
    """Receives the bytes while they are copied, one block at a time, in a buffer that is valid only during the call."""


class IntegerSlices(Protocol):
    """The part of an array's interface that is used; the array may be larger than memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.integer]: ...


class FileArray:
    """A one-dimensional array in a file, from byte ``offset`` to its end or ``count`` entries, read slice by slice.

    Not a memory map, because mapped pages would count as this process's memory.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str, offset: int = 0, count: int | None = None) -> None:
        self._path, self._dtype, self._offset = path, np.dtype(dtype), offset
        self._count = (os.path.getsize(path) - offset) // self._dtype.itemsize if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.integer]:
        start, stop, _ = part.indices(self._count)
        offset = self._offset + start * self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, count=max(stop - start, 0), offset=offset)


class HashedFile:
    """A file that is written sequentially and hashed at the same time.

    Args:
        on_block: receives everything that is written, one block at a time, in a buffer that is valid only during the
            call.
    """

    def __init__(self, path: Path, on_block: Callable[[memoryview], None] | None = None) -> None:
        self.path = path
        self._file = open_new(path)
        self._digest = xxhash.xxh3_128()
        self._on_block = on_block

    @property
    def hexdigest(self) -> str:
        """Return the xxh3-128 of everything written so far."""
        return self._digest.hexdigest()

    def append(self, content: bytes | memoryview | FileRange) -> None:
        """Append bytes, or a part of another file."""
        if isinstance(content, FileRange):
            self.copy(content)
        else:
            self.write(content)

    def write(self, block: bytes | memoryview) -> None:
        """Append ``block``."""
        self._file.write(block)
        self._see(memoryview(block))

    def copy(self, part: FileRange) -> None:
        """Append a part of another file; the kernel copies it."""
        self._file.flush()
        with open(part.path, "rb") as source:
            # Block by block, so that a file larger than memory is read from the disk once, and not again for the hash.
            for start in range(part.start, part.stop, _BLOCK_BYTES):
                stop = min(start + _BLOCK_BYTES, part.stop)
                _copy_range(source.fileno(), self._file.fileno(), start, stop - start)
                with _mapped(source.fileno(), start, stop) as view:
                    self._see(view)
                    if part.on_block is not None:
                        part.on_block(view)
        self._file.seek(0, os.SEEK_END)

    def fill(self, pattern: bytes, count: int) -> None:
        """Append ``pattern`` ``count`` times."""
        for first in range(0, count, 1 << 20):
            self.write(pattern * min(count - first, 1 << 20))

    def sync(self) -> None:
        """Flush to the disk."""
        sync_file(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _see(self, view: memoryview) -> None:
        self._digest.update(view)
        if self._on_block is not None and len(view):
            self._on_block(view)


def _copy_range(source: int, target: int, offset: int, count: int) -> None:
    """Append ``count`` bytes at ``offset`` of descriptor ``source`` to ``target``, with the cheapest system call
    available.
    """
    calls: list[Callable[[int, int], int]] = []
    if hasattr(os, "copy_file_range"):
        calls.append(lambda offset, count: os.copy_file_range(source, target, count, offset))
    if hasattr(os, "sendfile"):
        calls.append(lambda offset, count: os.sendfile(target, source, offset, count))
    calls.append(lambda offset, count: os.write(target, os.pread(source, min(count, 8 << 20), offset)))
    # Not all file systems can copy within the kernel, and macOS sends only to sockets.
    unsupported = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTSOCK}
    unsupported.add(errno.EPERM)
    while count > 0:
        try:
            copied = calls[0](offset, count)
        except OSError as error:
            if len(calls) == 1 or error.errno not in unsupported:
                raise
            del calls[0]
            continue
        if copied == 0:
            # Some file systems report the end of the file when they cannot copy; only the last method's report is
            # reliable.
            if len(calls) == 1:
                raise OSError(errno.EIO, "the file became shorter while it was being copied")
            del calls[0]
        offset, count = offset + copied, count - copied


@contextmanager
def _mapped(descriptor: int, start: int, stop: int) -> Iterator[memoryview]:
    """Return the bytes [start, stop) of a file, mapped."""
    base = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        mmap.mmap(descriptor, stop - base, access=mmap.ACCESS_READ, offset=base) as mapped,
        memoryview(mapped) as view,
        view[start - base :] as block,
    ):
        yield block
