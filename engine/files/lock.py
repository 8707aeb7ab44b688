"""Lock a folder for one writer. The operating system releases the lock when its holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LOCK_FILE = ".lock"
_HELD = (errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_descriptors: set[int] = set()
"""Those of the locks that this process holds."""


@contextmanager
def exclusive_lock(path: Path, held_by: Callable[[str], str]) -> Iterator[str | None]:
    """Hold a lock on the file ``path``, which is created if it is absent. It is not removed: others may wait for it.

    Args:
        path: of the lock file. It is never opened through a link.
        held_by: returns the error's text, given a description of the process that holds the lock.

    Yields:
        The reason if this file system has no locks, else None.

    Raises:
        UserError: another process holds the lock, or has just removed the file with its folder.
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    _descriptors.add(descriptor)
    try:
        unsupported = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip() or "another process"
                raise UserError(held_by(holder)) from None
            if error.errno not in _UNSUPPORTED:
                raise
            unsupported = error.strerror
        if os.fstat(descriptor).st_nlink == 0:
            raise UserError(
                f"{path.parent}: another process has just finished writing to it; check its contents, then start again"
            )
        if unsupported is None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield unsupported
    finally:
        if descriptor in _descriptors:
            _descriptors.remove(descriptor)
            os.close(descriptor)


def _close_in_child() -> None:
    """Give up the copies that a forked process has of its parent's locks: these would outlive the parent."""
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def run_folder_lock(run_folder: str | Path) -> Iterator[list[str]]:
    """Hold ``{run_folder}/.lock``, so that one process at a time writes to a run folder.

    Yields:
        Lines for the log, if the file system has no locks.

    Raises:
        UserError: another process holds it.
        OSError: the folder cannot be written.
    """
    path = Path(run_folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)

    def held_by(holder: str) -> str:
        remedy = "wait for it or stop it, or choose another run_folder"
        return f"run_folder {path.parent}: {holder} is writing to it (it holds {path}); {remedy}"

    with exclusive_lock(path, held_by) as unsupported:
        note = f"{path} cannot be locked on this file system ({unsupported}): a second run is not kept from writing"
        yield [f"{note} to the same run_folder"] if unsupported else []
