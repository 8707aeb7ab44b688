"""Divide host memory for many buffers into slabs whose sizes are powers of two.

PyTorch rounds every allocation of pinned memory up to a power of two and keeps it (CachingHostAllocator), so a buffer
of its own for each tensor of a 7B model takes 1.9 times the tensors' size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLAB_BYTES = 2**33
"""Size of the largest slabs. A buffer that is larger is in a larger slab, which others fill up."""
ALIGNMENT = 512
"""Of every buffer, in bytes: as large as the alignment of GPU memory in PyTorch."""


@dataclass(frozen=True)
class SlabPlan:
    """Where each buffer is."""

    slab_bytes: list[int]
    """Size of each slab, a power of two."""
    places: list[tuple[int, int]]
    """(slab, offset in bytes) of each buffer, in their order."""

    @property
    def total_bytes(self) -> int:
        """Size of all slabs."""
        return sum(self.slab_bytes)


def plan_slabs(sizes: Sequence[int]) -> SlabPlan:
    """Place buffers of ``sizes`` bytes: the largest first, each in the first slab that has room for it.

    A new slab is never larger than what is left to place, so that it becomes full.
    """
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    capacities: list[int] = []
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    left = sum(aligned)
    for index in sorted(range(len(sizes)), key=lambda index: -aligned[index]):
        size = aligned[index]
        fitting = (slab for slab, capacity in enumerate(capacities) if used[slab] + size <= capacity)
        slab = next(fitting, len(capacities))
        if slab == len(capacities):
            capacities.append(max(power_of_two(size), min(SLAB_BYTES, power_of_two(left + 1) // 2)))
            used.append(0)
        places[index] = slab, used[slab]
        used[slab] += size
        left -= size
    return SlabPlan([power_of_two(size) for size in used], places)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()
