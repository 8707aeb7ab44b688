"""Which rank keeps the others waiting: every rank's own times, told to all on log steps.

Ranks that train together end every step together, so that the length of a step, or of a phase, says nothing of who was
late. What does is time in which a rank waits for nobody: reading its data, and computing its blocks forward once their
parameters have been gathered. A rank that is slow there has little to wait for before its blocks; the others have much.

Data is timed in every step. Blocks are timed in one step between two reports, with events on the GPU's own clock, which
are read when the device has passed them anyway. Ranks that share matrices or tokens also wait for each other inside of
a block: of those, any may be named. Backward passes and the optimizer are not timed.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..parallel.process_group import Ranks

EXCESS = 0.2
"""Share by which a rank's own time must exceed the others' median in two reports running to be spoken of."""
EXCESS_SECONDS = 0.02
"""Seconds of a step by which it must exceed it as well: short steps differ by as much for no reason."""
_MOST_TIMED = 512  # calls of blocks in a step
_PARTS = {"data": "reading data", "blocks": "the blocks' forward pass"}


class Times(NamedTuple):
    """Seconds of a step on one rank."""

    data: float
    """Until its samples were there."""
    blocks: float
    """Blocks' forward passes."""
    waiting: float
    """Before its blocks, for their parameters."""

    @property
    def own(self) -> float:
        """In which the rank waited for no other."""
        return self.data + self.blocks


class Report(NamedTuple):
    """Of the steps since the last one."""

    values: dict[str, float]
    """For the record: the slowest rank, its times, and the medians of the others'."""
    lines: list[str]
    """For people; none where no rank is much slower than the others."""


class Stragglers:
    """Times this rank, and compares it with the others.

    Args:
        ranks: that train together. A single one is not timed.
        blocks: of this rank.
        enabled: whether anything is done at all.
    """

    def __init__(self, ranks: Ranks, blocks: Iterable[nn.Module], enabled: bool):
        self._ranks, self._active = ranks, enabled and ranks.world_size > 1
        self._clock: _HostClock | _DeviceClock = _DeviceClock() if ranks.device.type == "cuda" else _HostClock()
        self._marks: list[tuple[Any, Any, Any]] = []
        self._calls, self._steps, self._data_seconds = 0, 0, 0.0
        # The first step compiles and allocates.
        self._wanted, self._timing = False, False
        self._suspect: int | None = None
        if not self._active:
            return
        self._hosts = ranks.all_gather(socket.gethostname())
        for block in blocks:
            _BlockTimer(self._clock, self._keeps_time, self._marks).attach(block)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A step begins; inside, its data is waited for."""
        self._timing, self._wanted = self._wanted, False
        began = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - began
        self._steps += 1

    def report(self) -> Report:
        """Compare the ranks. All must call this, where they have waited for the device anyway."""
        if not self._active:
            return Report({}, [])
        timed, mine = bool(self._calls), self._own_times()
        self._marks.clear()
        self._calls, self._steps, self._data_seconds, self._wanted = 0, 0, 0.0, True
        return self._compared(_of_all(self._ranks, mine)) if timed else Report({}, [])

    def _keeps_time(self) -> bool:
        """A block is called: whether that is timed. Evaluations, which keep no gradients, are not."""
        if not self._timing or not torch.is_grad_enabled():
            return False
        self._calls += 1
        return len(self._marks) < _MOST_TIMED

    def _own_times(self) -> Times:
        scale = self._calls / max(1, len(self._marks))
        waiting = scale * sum(self._clock.seconds(called, begun) for called, begun, _ in self._marks)
        blocks = scale * sum(self._clock.seconds(begun, ended) for _, begun, ended in self._marks)
        return Times(self._data_seconds / max(1, self._steps), blocks, waiting)

    def _compared(self, times: list[Times]) -> Report:
        slowest = max(range(len(times)), key=lambda rank: times[rank].own)
        its = times[slowest]
        others = [of_rank for rank, of_rank in enumerate(times) if rank != slowest]
        usual = Times(*(statistics.median(column) for column in zip(*others, strict=True)))
        values: dict[str, float] = {"slowest_rank": slowest}
        for part in Times._fields:
            values[f"slowest_rank_{part}_seconds"] = getattr(its, part)
            values[f"other_ranks_{part}_seconds"] = getattr(usual, part)
        median = statistics.median(of_rank.own for of_rank in others)
        former, self._suspect = (
            self._suspect,
            slowest if its.own > max((1 + EXCESS) * median, median + EXCESS_SECONDS) else None,
        )
        if self._suspect is None or self._suspect != former:
            return Report(values, [])
        part = max(_PARTS, key=lambda part: getattr(its, part) - getattr(usual, part))
        line = (
            f"  slowest: rank {slowest} ({self._hosts[slowest]}), {_PARTS[part]} {getattr(its, part):.3f} s a step, "
            f"{getattr(usual, part):.3f} s on others, which wait for it"
        )
        return Report(values, [line])


def _of_all(ranks: Ranks, mine: Times) -> list[Times]:
    """The times of every rank: one sum of a small table, far quicker than exchanging objects."""
    table = torch.zeros(ranks.world_size, len(mine), dtype=torch.float64)
    table[ranks.rank] = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(table)
    return [Times(*row) for row in table.tolist()]


class _HostClock:
    """Where the host computes."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class _DeviceClock:
    """Moments in the work of the current stream, which also waits for what a collective brings."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


class _BlockTimer:
    """Marks when a block is called, when it has its parameters, and when it is through.

    FSDP gathers parameters in a hook of its own, which was there before: one of these comes before it, one after it.
    """

    def __init__(self, clock: _HostClock | _DeviceClock, wanted: Callable[[], bool], marks: list[tuple[Any, Any, Any]]):
        self._clock, self._wanted, self._marks = clock, wanted, marks
        self._called: Any = None
        self._begun: Any = None

    def attach(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self._on_call, prepend=True)
        block.register_forward_pre_hook(self._on_begin)
        block.register_forward_hook(self._on_end, prepend=True)

    def _on_call(self, block: nn.Module, inputs: Any) -> None:
        self._called = self._clock.mark() if self._wanted() else None

    def _on_begin(self, block: nn.Module, inputs: Any) -> None:
        self._begun = self._clock.mark() if self._called is not None else None

    def _on_end(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self._called is not None:
            self._marks.append((self._called, self._begun, self._clock.mark()))
