"""Remove folders. Files that cannot be removed are reported with their full paths, and stop nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path


def remove_tree(folder: Path) -> list[str]:
    """Remove ``folder`` and everything in it. A symbolic link is removed, never what it leads to.

    ``shutil.rmtree`` is not used: it refuses links, stops at the first file that cannot be removed, and names that file
    relative to a directory handle.

    Returns:
        ``full path: reason`` for each entry that could not be removed. Folders that are left because of their content
        are not listed.
    """
    problems: list[str] = []
    if folder.is_symlink():
        _attempt(os.unlink, str(folder), problems)
        return problems
    for place, folders, files in os.walk(folder, topdown=False, onerror=lambda error: _note(error, problems)):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in [*files, *links]:
            _attempt(os.unlink, os.path.join(place, name), problems)
        _attempt(os.rmdir, place, problems, ignored=errno.ENOTEMPTY if problems else errno.ENOENT)
    return problems


def _attempt(remove: Callable[[str], None], path: str, problems: list[str], ignored: int = errno.ENOENT) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != ignored:
            problems.append(f"{os.path.abspath(path)}: {error.strerror or error}")


def _note(error: OSError, problems: list[str]) -> None:
    if not isinstance(error, FileNotFoundError):
        problems.append(f"{os.path.abspath(error.filename)}: {error.strerror or error}")
