"""Open files that a user or a downloaded folder names: only regular ones, and without blocking.

Opening a FIFO waits for another program, and devices have no end. All errors are of ``OSError``, with a reason in
``strerror``, so that callers can report them like any other unreadable file.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import IO


class IrregularFile(OSError):
    """A FIFO, device or socket, or a file that is too large for its kind."""


def open_regular(path: str | os.PathLike[str], *, pipe: bool = False) -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        pipe: also accept a pipe that the shell has opened, ``<(command)`` or ``/dev/stdin``.

    Raises:
        IrregularFile: it is not a regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        of_shell = stat.S_ISFIFO(mode) and os.fspath(path).startswith(("/dev/", "/proc/"))
        if not stat.S_ISREG(mode) and not (pipe and of_shell):
            raise IrregularFile(errno.EINVAL, "not a regular file", os.fspath(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], most_bytes: int = 1 << 31, *, pipe: bool = False) -> bytes:
    """Return the content of a regular file of at most ``most_bytes``.

    Raises:
        IrregularFile: it is not a regular file, or is larger.
        OSError: it cannot be read.
    """
    with open_regular(path, pipe=pipe) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most_bytes else file.read(most_bytes + 1)
    if max(size, len(content)) > most_bytes:
        found = f"{size:,}" if size else "more"
        raise IrregularFile(errno.EFBIG, f"{found} bytes, at most {most_bytes:,} are read", os.fspath(path))
    return content
