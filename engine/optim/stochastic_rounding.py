"""Round fp32 to bf16 up or down at random, so that the expected result is the number itself.

The random bits are a function of (seed, step, name of the parameter, position in the whole parameter) only. They do not
depend on PyTorch's generators, the number of ranks, or the number of resumes.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor


def stream_key(seed: int, step: int, name: str) -> tuple[int, int]:
    """Return two int32 numbers as key of the random stream of the parameter ``name`` at a step."""
    digest = hashlib.blake2b(struct.pack("<2Q", seed, step) + name.encode(), digest_size=8).digest()
    return struct.unpack("<2i", digest)


def random_bits(positions: Tensor, keys: Tensor) -> Tensor:
    """Return 32 random bits for every position: a hash of it, keyed before and between two rounds.

    Args:
        positions: [...] int64, not negative.
        keys: [2] int32, from :func:`stream_key`.

    Returns:
        [...] int32.
    """
    high = (positions >> 32).to(torch.int32)
    return mixed(mixed(positions.to(torch.int32) ^ keys[0]) + keys[1] + high)


def mixed(bits: Tensor) -> Tensor:
    """Apply a bijection of int32 in which every input bit flips about half of the output bits.

    lowbias32 of C. Wellons, "Prospecting for Hash Functions" (2018), https://nullprogram.com/blog/2018/07/31/. Its
    shifts fill with zeros, but PyTorch's copy the sign, hence the masks. Products wrap around.
    """
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * 0x7FEB352D
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Return the bf16 neighbour above or below each value, the nearer one with higher probability: E[result] = value.

    bf16 is the upper half of fp32. Adding a uniform number to the lower half before it is cut off carries over with the
    right probability, to within 2^-16. Values that bf16 can represent are unchanged; so are infinities and NaN.

    Args:
        values: [...] fp32.
        bits: [...] int32; only the lower 16 bits are used.

    Returns:
        [...] bf16.
    """
    # The bits of a NaN may overflow into those of a number.
    raw = (values.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return torch.where(values.isfinite(), raw.view(torch.float32), values).to(torch.bfloat16)
