"""Mix 64-bit words with the finalizer of SplitMix64, for what has to look random and be the same everywhere and always.

Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014. Implemented here because NumPy does not
promise that its generators give the same numbers in later releases.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, made odd."""
_MASK = 2**64 - 1


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply a fixed bijection of 64-bit words in which each bit of the result depends on all bits of the argument.

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
    """Return :func:`mix64` of the lowest 64 bits of one integer. For single numbers this is faster than NumPy."""
    word &= _MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)
