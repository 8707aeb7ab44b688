"""Random bits as a function of a key and of positions.

They do not depend on PyTorch's generators, so they are the same in every layout of ranks and after every resume.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor


def stream_key(seed: int, step: int, name: str) -> tuple[int, int]:
    """Return two int32 numbers as key of the random stream ``name``, such as a parameter, at a step."""
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


def uniform(positions: Tensor, keys: Tensor) -> Tensor:
    """Return a random number in [0, 1) for every position, a multiple of 2^-24.

    Args:
        positions: [...] int64, not negative.
        keys: [2] int32, from :func:`stream_key`.

    Returns:
        [...] fp32.
    """
    return _unit_interval(random_bits(positions, keys))


def token_uniform(token_numbers: Tensor, features: Tensor, keys: Tensor) -> Tensor:
    """Return a random number in [0, 1) for every feature of every token, a multiple of 2^-24.

    A rank that has some of the tokens or some of the features passes their numbers, and gets the values that one rank
    with all of them would. The bits of a token (:func:`random_bits`) are mixed with those of the feature, so nothing
    of shape [T, F] is wider than 32 bits.

    Args:
        token_numbers: [T] int64, not negative: ``Batch.token_numbers``.
        features: [F] int64, the numbers of the features in the whole tensor, from zero.
        keys: [2] int32, from :func:`stream_key`.

    Returns:
        [T, F] fp32.
    """
    of_feature = mixed(features.to(torch.int32) ^ keys[1])
    return _unit_interval(mixed(random_bits(token_numbers, keys)[:, None] ^ of_feature))


def _unit_interval(bits: Tensor) -> Tensor:
    """Return the upper 24 bits as fp32 in [0, 1)."""
    return ((bits >> 8) & 0xFFFFFF).float() * 2.0**-24
