"""Raise the limit of open files, which some machines set far below what PyTorch needs."""

from __future__ import annotations

import resource

from ..errors import UserError

_WANTED = 4096
_LEAST = 128
"""Minimum for a run: with a handful of datasets it has some 60 files, pipes and sockets open."""


def raise_open_files_limit() -> None:
    """Raise the soft limit of this process as far as it is allowed.

    Raises:
        UserError: even the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    goal = _WANTED if hard == unlimited else min(_WANTED, hard)
    if soft != unlimited and soft < goal:
        resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
        soft = goal
    if soft != unlimited and soft < _LEAST:
        raise UserError(
            f"this process may open {soft} files at a time, too few for a run; raise the limit: ulimit -n 4096"
        )
