"""How many threads copy tensors."""

from __future__ import annotations

import os

from ..errors import UserError

MAX_WORKERS = 8
"""Most that is chosen where nobody says how many: a disk has had enough by then."""


def default_workers() -> int:
    """One for each CPU that this process may use, up to :data:`MAX_WORKERS`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)


def parse_workers(workers: int | None) -> int:
    """The number of ``--workers``; by default one for each CPU, up to 8.

    Raises:
        UserError: it is not positive.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    return workers or default_workers()
