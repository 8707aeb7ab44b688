"""What a disk can still take, and what makes space on it."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system reports where a disk, or a user's share of it, is full."""


def nearest(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists; a link or file in the way counts as existing."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def free_bytes(folder: Path) -> int:
    """What the user may still write on the disk of ``folder``, which need not exist."""
    status = os.statvfs(nearest(folder))
    return status.f_bavail * status.f_frsize


def require_space(folder: Path, needed: int, what: str, remedy: Callable[[], str]) -> None:
    """Refuse a disk that cannot take ``needed`` bytes more.

    Args:
        folder: that is to be written.
        needed: estimated size.
        what: such as "a checkpoint".
        remedy: what can be done about it.

    Raises:
        UserError: with both sides of the arithmetic.
    """
    free = free_bytes(folder)
    if free < needed:
        raise UserError(f"{folder}: {describe_space(needed, free, what)}; {remedy()}")


def describe_space(needed: int, free: int, what: str) -> str:
    """Both sides of the arithmetic."""
    return f"no space left for {what}: about {format_bytes(needed)} are needed, {format_bytes(free)} are free"


def is_about_space(message: str) -> bool:
    """Whether an error's line says that a disk, or a user's share of it, is full."""
    return any(os.strerror(number) in message for number in NO_SPACE)


def describe_pruning(run_folder: Path, removable: Collection[Path], keep_every: int) -> str:
    """The command that makes space, and how much.

    Args:
        run_folder: of the run.
        removable: its checkpoints that would go if only the newest and those with other reasons were kept.
        keep_every: of the run.
    """
    if not removable:
        return "free some space there, or put run_folder on another disk"
    size = sum(file.stat().st_size for folder in removable for file in folder.rglob("*") if file.is_file())
    every = f" --keep-every {keep_every}" if keep_every else ""
    number = f"{len(removable)} checkpoint{'s' if len(removable) > 1 else ''}"
    command = f"python tools/checkpoint.py prune {shlex.quote(str(run_folder))} --keep-last 1{every}"
    return f"{command} removes {number} and frees {format_bytes(size)}"


def format_bytes(count: float) -> str:
    """Such as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
