"""One writer to a run folder: a lock that the operating system lets go of when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LOCK_FILE = ".lock"
_HELD = (errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


@contextmanager
def run_folder_lock(run_folder: str | Path) -> Iterator[list[str]]:
    """Hold ``{run_folder}/.lock``, which is made and stays: a file that is removed could be locked twice.

    Yields:
        lines for the log: that the file system has no locks, where it has none.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = Path(run_folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        notes = _take(descriptor, path)
        yield notes
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> list[str]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip() or "another process"
            raise UserError(
                f"run_folder {path.parent}: {holder} is writing to it (it holds {path}); wait for it or stop it, or "
                "choose another run_folder"
            ) from None
        if error.errno in _UNSUPPORTED:
            return [
                f"{path} cannot be locked on this file system ({error.strerror}): nothing stops a second run from "
                "writing to the same run_folder"
            ]
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return []
