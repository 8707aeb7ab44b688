"""Write files and folders that appear under their names only when they are complete and on the disk."""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from .removal import remove_tree


def temporary_path(path: Path) -> Path:
    """Return a unique hidden name next to ``path``, to write it under before it is renamed."""
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write ``path`` so that readers find either its former content or all of ``chunks``, also after a power failure.

    Raises:
        OSError: it cannot be written. The former content is unchanged.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.writelines(chunks)
            sync_file(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_absent(output: str | Path) -> Path:
    """Return ``output`` as a path, after checking that it does not exist.

    Raises:
        UserError: it exists.
    """
    if os.path.lexists(output):
        raise UserError(f"--output {output}: exists already and is not overwritten; remove it or choose another")
    return Path(output)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``, next to it, and remove a former ``folder``. Both are complete folders.

    On Linux a reader of the name finds either of the two. Elsewhere, the name is missing for a moment.

    Raises:
        OSError: it cannot be renamed.
    """
    old = folder.with_name(f".{folder.name}.old")
    remove_tree(old)
    if os.path.lexists(folder):
        if _exchange(new, folder):
            new.rename(old)
        else:
            folder.rename(old)
            new.rename(folder)
    else:
        new.rename(folder)
    sync_path(folder.parent)
    remove_tree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return whether the system can do that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``output``; it is flushed to disk and renamed to ``output`` at the end.

    After an error or Ctrl-C the temporary folder is removed.

    Raises:
        UserError: ``output`` exists, or cannot be written.
    """
    require_absent(output)
    temporary = temporary_path(output)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        require_absent(output)
        temporary.rename(output)
        sync_path(output.parent)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from error
    finally:
        remove_tree(temporary)


def sync_file(file: IO[Any]) -> None:
    """Flush an open file, including what Python still buffers, to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Flush every file and directory below ``folder`` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root) / name)
        sync_path(Path(root))


def sync_path(path: Path) -> None:
    """Flush one file, or the names in one directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
