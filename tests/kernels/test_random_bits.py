"""Random numbers of tokens and features against the same hash in numpy, and their statistics."""

import numpy as np
import pytest
import torch

from retemper.kernels.random_bits import stream_key, token_uniform

KEY = stream_key(7, 0, "noise")


def lowbias32(x: np.ndarray) -> np.ndarray:
    """The published hash in unsigned arithmetic: https://nullprogram.com/blog/2018/07/31/."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def expected(numbers: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The documented formula of ``token_uniform`` in numpy."""
    k0, k1 = (np.array(key, np.int64).astype(np.uint32) for key in KEY)
    low, high = (numbers & 0xFFFFFFFF).astype(np.uint32), (numbers >> 32).astype(np.uint32)
    token = lowbias32(lowbias32(low ^ k0) + k1 + high)
    feature = lowbias32(features.astype(np.uint32) ^ k1)
    return (lowbias32(token[:, None] ^ feature[None, :]) >> np.uint32(8)) / 2.0**24


def actual(numbers: np.ndarray, features: np.ndarray) -> np.ndarray:
    keys = torch.tensor(KEY, dtype=torch.int32)
    return token_uniform(torch.from_numpy(numbers), torch.from_numpy(features), keys).numpy()


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 3, 10**15], ids=["first", "sign", "carry", "large"])
def test_same_as_in_numpy(first):
    numbers, features = np.arange(first, first + 40), np.arange(50)
    assert np.array_equal(actual(numbers, features), expected(numbers, features))


def test_uniform_and_uncorrelated():
    values = actual(np.arange(4096), np.arange(256)).astype(np.float64)
    count = values.size
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 5 * np.sqrt(1 / 12 / count)
    assert abs(values.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / count)
    centered = (values - 0.5) * np.sqrt(12)
    for other in (centered[1:] * centered[:-1], centered[:, 1:] * centered[:, :-1], centered[64:] * centered[:-64]):
        assert abs(other.mean()) < 5 / np.sqrt(other.size)
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    assert ((counts - count / 64) ** 2 / (count / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)


def test_parts_are_those_of_the_whole():
    whole = actual(np.arange(100, 132), np.arange(48))
    assert np.array_equal(actual(np.arange(108, 116), np.arange(16, 32)), whole[8:16, 16:32])
