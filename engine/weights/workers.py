"""Distribute work over threads and ranks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from ..errors import UserError
from ..system import usable_cores

MAX_WORKERS = 8
"""Maximum of the default number of workers: more do not speed up a disk."""


class WorkerStopped(Exception):
    """Raised in a worker thread to end it, after another one has failed."""


def default_workers() -> int:
    """Return one worker for each usable CPU, up to :data:`MAX_WORKERS`."""
    usable = usable_cores()
    return min(usable, MAX_WORKERS)


def parse_workers(workers: int | None) -> int:
    """Return the number of ``--workers``; by default one for each CPU, up to 8.

    Raises:
        UserError: it is not positive.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1 is needed")
    return workers or default_workers()


def share_by_size(sizes: Mapping[str, int], worker: int, num_workers: int) -> list[str]:
    """Return the files of ``worker``, given the size of every file by name.

    The largest come first. Each goes to the worker with the fewest bytes so far.
    """
    loads = [(0, number) for number in range(num_workers)]
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], number))
        mine += [name] if number == worker else []
    return mine
