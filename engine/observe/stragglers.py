"""Find slow ranks (stragglers) by comparing the times of all ranks on log steps.

Ranks end every step together, so the length of a step or of a phase does not show which rank was slow. Compared is the
time in which a rank does not wait for others: reading its data, and computing the forward pass of its blocks after
their parameters have been gathered. A slow rank waits little before its blocks, and the others wait long.

Data is timed in every step. Blocks are timed in one step between two reports, with GPU events that are read after the
device has passed them. Ranks that share matrices or tokens also wait for each other inside of a block, so any of them
may be reported. Backward passes and the optimizer are not timed.
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
"""A rank is slow if its own time exceeds the others' median by this share in two consecutive reports."""
EXCESS_SECONDS = 0.02
"""It must also exceed it by this many seconds of a step: short steps vary as much."""
_MOST_TIMED = 512  # number of block calls in a step
_PARTS = {"data": "reading data", "blocks": "the blocks' forward pass"}


class Times(NamedTuple):
    """Times of one rank, in seconds per step."""

    data: float
    """Waiting for its samples."""
    blocks: float
    """Blocks' forward passes."""
    waiting: float
    """Waiting for the parameters of its blocks."""

    @property
    def own(self) -> float:
        """Return the time in which the rank did not wait for others."""
        return self.data + self.blocks


class Report(NamedTuple):
    """Comparison of the ranks since the last report."""

    values: dict[str, float]
    """Values for the record: the slowest rank, its times, and the medians of the others."""
    lines: list[str]
    """Lines for people, if a rank is much slower than the others."""


class Lap(NamedTuple):
    """What was timed on this rank between two reports. Events of the device may lie ahead of it."""

    marks: list[tuple[Any, Any, Any]]
    """When a block was called, had its parameters, and ended."""
    calls: int
    """Number of blocks' calls, of which only the first are marked."""
    steps: int
    data_seconds: float


class Stragglers:
    """Times this rank, and compares it with the others.

    Args:
        ranks: all ranks. A single one is not timed.
        blocks: of this rank.
        enabled: False does nothing.
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
        """Time the wait for the data of a step inside."""
        self._timing, self._wanted = self._wanted, False
        began = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - began
        self._steps += 1

    def lap(self) -> Lap:
        """Return what was timed since the last lap, and time a step of the next. Does not wait for the device."""
        lap = Lap(list(self._marks), self._calls, self._steps, self._data_seconds)
        self._marks.clear()  # which the blocks' timers share
        self._calls, self._steps, self._data_seconds, self._wanted = 0, 0, 0.0, True
        return lap

    def report(self, lap: Lap) -> Report:
        """Compare the ranks in ``lap``. All must call this, after the device has passed its end."""
        if not self._active or not lap.calls:
            return Report({}, [])
        return self._compared(_of_all(self._ranks, self._own_times(lap)))

    def _keeps_time(self) -> bool:
        """Return whether to time this call of a block. Evaluations, which keep no gradients, are not timed."""
        if not self._timing or not torch.is_grad_enabled():
            return False
        self._calls += 1
        return len(self._marks) < _MOST_TIMED

    def _own_times(self, lap: Lap) -> Times:
        scale = lap.calls / max(1, len(lap.marks))
        waiting = scale * sum(self._clock.seconds(called, begun) for called, begun, _ in lap.marks)
        blocks = scale * sum(self._clock.seconds(begun, ended) for _, begun, ended in lap.marks)
        return Times(lap.data_seconds / max(1, lap.steps), blocks, waiting)

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
    """Return the times of all ranks: one sum of a small table, much faster than exchanging objects."""
    table = torch.zeros(ranks.world_size, len(mine), dtype=torch.float64)
    table[ranks.rank] = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(table)
    return [Times(*row) for row in table.tolist()]


class _HostClock:
    """Times on the CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class _DeviceClock:
    """Times on the GPU's current stream, which also waits for collectives."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000


class _BlockTimer:
    """Records when a block is called, when it has its parameters, and when it ends.

    FSDP gathers parameters in its own hook, which is registered already: one of these runs before it, one after it.
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
