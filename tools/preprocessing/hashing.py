"""A keyed mixing of 64-bit words, for what has to look random and be the same everywhere and always."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, made odd."""


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A fixed bijection of 64-bit words in which each bit of the result depends on all bits of the argument.

    The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).

    Args:
        words: uint64 of any shape; not changed.

    Returns:
        uint64 of the same shape.
    """
    mixed = words >> np.uint64(30)
    mixed ^= words
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def mix64_of(word: int) -> int:
    """:func:`mix64` of one Python integer, of which the lowest 64 bits count."""
    return int(mix64(np.array([word % 2**64], dtype=np.uint64))[0])
