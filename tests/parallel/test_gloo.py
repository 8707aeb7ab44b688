"""Each group of gloo has one thread: two would damage the memory of the process (see engine/parallel/gloo.py)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from retemper.engine.parallel.process_group import Ranks


def threads() -> int:
    """Number of threads of this process that run collectives."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("pt_gloo_runloop")


def count_threads(ranks: Ranks) -> tuple[int, list[float]]:
    """Threads of a new group, and what two collectives at once return."""
    dist.barrier()  # a thread has its name once it has run a collective
    before = threads()
    group = dist.new_group(backend="gloo")
    values = [torch.full((4,), float(ranks.rank)), torch.full((4,), 2.0)]
    works = [dist.all_reduce(value, group=group, async_op=True) for value in values]
    for work in works:
        assert work is not None
        work.wait()
    return threads() - before, [float(value.sum()) for value in values]


def test_a_group_has_one_thread(two_ranks):
    for added, sums in two_ranks.run(count_threads):
        assert added == 1
        assert sums == [4.0, 16.0]
