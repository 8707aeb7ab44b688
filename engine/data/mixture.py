"""Map sample numbers to sources by a periodic table of slots with exact proportions.

Prefix counts over the table give the number of samples that each source has given before any slot. So any sample is
looked up in O(1), without replaying the earlier ones. The chunk of a sample and changes of the mixture are handled
elsewhere (sample_order.py, curriculum.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MIXTURE_RESOLUTION = 10_000
"""Slots in the longest mixture period: weights are exact to 1 / MIXTURE_RESOLUTION."""


class Mixture:
    """An endless sequence of samples from weighted sources, with exact counts in every period.

    Args:
        weights: positive and finite, one for each source; only their proportions count.
    """

    def __init__(self, weights: Sequence[float]):
        self._quotas, self._slots, self._counts_before = _table(tuple(weights), MIXTURE_RESOLUTION)
        self.period = len(self._slots)

    def source(self, index: int) -> int:
        """Return the position of the source of sample ``index``."""
        return int(self._slots[index % self.period])

    def lookup(self, index: int) -> tuple[int, int]:
        """Return the source of sample ``index``, and the number of samples that it has given before."""
        whole, slot = divmod(index, self.period)
        source = int(self._slots[slot])
        return source, whole * self._quotas[source] + int(self._counts_before[slot])

    def counts(self, index: int) -> list[int]:
        """Return how many of the first ``index`` samples come from each source."""
        whole, rest = divmod(index, self.period)
        partial = np.bincount(self._slots[:rest], minlength=len(self._quotas))
        return [whole * quota + int(count) for quota, count in zip(self._quotas, partial, strict=True)]

    def samples_until(self, source: int, count: int) -> int:
        """Return the smallest number of samples among which ``source`` has given ``count`` >= 1."""
        whole, rest = divmod(count - 1, self._quotas[source])
        return whole * self.period + int(np.flatnonzero(self._slots == source)[rest]) + 1


@functools.lru_cache(maxsize=64)
def _table(
    weights: tuple[float, ...], resolution: int
) -> tuple[list[int], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the slots of each source in a period, the source of each slot, and the number of earlier slots of that
    source.

    Cached, because consecutive stages often share a mixture, and a table takes up to 20 ms.
    """
    quotas = _quotas(weights, resolution)
    slots = _spread(quotas)
    counts_before = np.empty_like(slots)
    for source, quota in enumerate(quotas):
        counts_before[slots == source] = np.arange(quota)
    return quotas, slots, counts_before


def _quotas(weights: Sequence[float], resolution: int) -> list[int]:
    """Return the slots of each source in one period, by largest remainder, divided by their greatest common divisor."""
    total = math.fsum(weights)
    exact = [weight / total * resolution for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for position in range(resolution - sum(quotas)):
        quotas[by_remainder[position % len(quotas)]] += 1
    divisor = math.gcd(*quotas)
    return [quota // divisor for quota in quotas]


def _spread(quotas: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return [period] slots in which each source appears ``quotas`` times, spread evenly by a greedy rule.

    Every slot goes to the unfinished source that is furthest behind its share; the first of several wins.
    """
    period = sum(quotas)
    share, left = np.array(quotas, dtype=np.int64), list(quotas)
    behind = np.zeros_like(share)  # period x (slots due - slots taken)
    slots = np.empty(period, dtype=np.int32)
    for slot in range(period):
        behind += share
        slots[slot] = chosen = int(behind.argmax())
        behind[chosen] -= period
        left[chosen] -= 1
        if not left[chosen]:
            share[chosen], behind[chosen] = 0, np.iinfo(np.int64).min
    return slots
