"""Check that shards cover a tensor exactly, without gaps or overlaps.

A reader that copies shards into memory would otherwise leave former values in the gaps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets of the first element, and sizes."""
_MOST_AXES = 8
"""Limit of dimensions along which a tensor is cut: each doubles the number of corners of a shard."""


def coverage_problem(shape: tuple[int, ...], shards: Sequence[Box]) -> str | None:
    """Return why ``shards`` do not cover a tensor of ``shape`` exactly; None if they do.

    Shards without elements are ignored. Time and memory depend on the number of shards only.
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
        return f"has {num_elements:,} elements, but its shards hold some twice and miss others"
    return None


def _corners(boxes: Sequence[Box], axes: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Count the corners of ``boxes`` at each point, with the sign (-1) ** (number of upper ends); zeros are left out.

    The number of boxes over an element is the running sum of these counts along all axes. So equal corners mean equal
    numbers of boxes: exactly one everywhere, if the corners are those of the whole tensor.
    """
    signs = [math.prod(ends) for ends in product((1, -1), repeat=len(axes))]
    counts: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        spans = [(offsets[axis], offsets[axis] + sizes[axis]) for axis in axes]
        for corner, sign in zip(product(*spans), signs, strict=True):
            counts[corner] += sign
    return {corner: count for corner, count in counts.items() if count}
