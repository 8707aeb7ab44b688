"""Check free space on a disk, and describe how to make space."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import UserError, command_name

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk or an exceeded quota."""


def nearest(folder: Path) -> Path:
    """Return ``folder``, or the nearest folder above it that exists; broken links and files count as existing."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def free_bytes(folder: Path) -> int:
    """Return the free bytes for this user on the disk of ``folder``, which need not exist."""
    status = os.statvfs(nearest(folder))
    return status.f_bavail * status.f_frsize


def require_space(folder: Path, needed: int, what: str, remedy: Callable[[], str]) -> None:
    """Refuse a disk with less than ``needed`` free bytes.

    Args:
        folder: to be written.
        needed: estimated size.
        what: such as "a checkpoint".
        remedy: returns the remedy for the error.

    Raises:
        UserError: gives both numbers.
    """
    free = free_bytes(folder)
    if free < needed:
        raise UserError(f"{folder}: {describe_space(needed, free, what)}; {remedy()}")


def describe_space(needed: int, free: int, what: str) -> str:
    """Return a clause with both numbers."""
    return f"no space left for {what}: about {format_bytes(needed)} are needed, {format_bytes(free)} are free"


def is_about_space(message: str) -> bool:
    """Return whether an error line reports a full disk or an exceeded quota."""
    return any(os.strerror(number) in message for number in NO_SPACE)


def describe_pruning(run_folder: Path, removable: Collection[Path], keep_every: int) -> str:
    """Return the command that makes space, and how much.

    Args:
        run_folder: of the run.
        removable: the checkpoints that the command removes.
        keep_every: setting of the run.
    """
    if not removable:
        return "free some space there, or put run_folder on another disk"
    size = sum(file.stat().st_size for folder in removable for file in folder.rglob("*") if file.is_file())
    every = f" --keep-every {keep_every}" if keep_every else ""
    number = f"{len(removable)} checkpoint{'s' if len(removable) > 1 else ''}"
    prune = f"{command_name('checkpoint', 'tools/checkpoint.py')} prune"
    command = f"{prune} {shlex.quote(str(run_folder))} --keep-last 1{every}"
    return f"{command} removes {number} and frees {format_bytes(size)}"


def format_bytes(count: float) -> str:
    """Return a size such as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
