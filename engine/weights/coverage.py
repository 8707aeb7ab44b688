"""Whether the shards of a tensor make it up: every element in one of them, and in one only.

A reader that copies shards into memory would otherwise leave there what stood before, wherever none of them reaches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets of the first element, and sizes."""
_MOST_AXES = 8
"""Along which a tensor may be cut: each doubles the corners of a shard. Device meshes have no more."""


def coverage_problem(shape: tuple[int, ...], shards: Sequence[Box]) -> str | None:
    """What keeps ``shards`` from being a tensor of ``shape``, cut in whatever way; None when they are.

    Shards without elements may lie anywhere: nobody reads them. Time and memory grow with the number of shards only.
    """
    for offsets, sizes in shards:
        if not len(offsets) == len(sizes) == len(shape) or min(sizes, default=0) < 0:
            return f"is {list(shape)}, a shard {list(sizes)} at {list(offsets)}"
    filled = [(offsets, sizes) for offsets, sizes in shards if 0 not in sizes]
    for offsets, sizes in filled:
        for first, size, length in zip(offsets, sizes, shape, strict=True):
            if first < 0 or first + size > length:
                return f"is {list(shape)}, a shard of {list(sizes)} at {list(offsets)} lies outside"
    num_elements, present = math.prod(shape), sum(math.prod(sizes) for _, sizes in filled)
    if present != num_elements:
        return f"has {num_elements:,} elements, its shards {present:,}"
    if not filled:
        return None
    axes = [axis for axis, length in enumerate(shape) if any(sizes[axis] != length for _, sizes in filled)]
    if len(axes) > _MOST_AXES:
        return f"is cut along {len(axes)} of its dimensions, at most {_MOST_AXES} are read"
    if _corners(filled, axes) != _corners([((0,) * len(shape), shape)], axes):
        return f"has {num_elements:,} elements, of which its shards hold some twice and others not at all"
    return None


def _corners(boxes: Sequence[Box], axes: Sequence[int]) -> dict[tuple[int, ...], int]:
    """How often each point is a corner of ``boxes``, with the sign (-1) ** (number of upper ends), where not 0.

    These are the mixed differences of the number of boxes over each element. That number is their running sum along
    all axes, so that equal corners mean equal numbers: exactly one, if the corners are those of the whole tensor.
    """
    signs = [math.prod(ends) for ends in product((1, -1), repeat=len(axes))]
    counts: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        spans = [(offsets[axis], offsets[axis] + sizes[axis]) for axis in axes]
        for corner, sign in zip(product(*spans), signs, strict=True):
            counts[corner] += sign
    return {corner: count for corner, count in counts.items() if count}
