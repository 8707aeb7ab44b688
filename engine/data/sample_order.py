"""The order in which samples are trained on, as a pure function of (seed, sources, weights, sequence length).

Sample ``i`` of the run is looked up in O(1) from its number alone: no index files, no shuffled array, no state. The
order therefore does not depend on the number of ranks, the micro-batch, worker threads or the length of the run, and
a resume needs one number.

Two ideas make it so. A *blend* is a fixed table of slots with exact proportions, repeated for ever; prefix counts over
the table say how many samples each source has given before any slot. A source's windows are visited in an order that a
*Feistel network* permutes anew in every epoch (Black and Rogaway, 2002, "Ciphers with Arbitrary Finite Domains").
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BLEND_RESOLUTION = 10_000
"""Slots of the longest blend period: weights are honoured to 1 / BLEND_RESOLUTION."""

_FEISTEL_ROUNDS = 6
_MASK_64 = 2**64 - 1


class Permutation:
    """A keyed bijection on ``range(size)`` that is evaluated one element at a time, in constant memory."""

    def __init__(self, size: int, key: str):
        assert size >= 1
        self.size = size
        # The network permutes 2 * half_bits bits; values that fall outside the range walk on along their cycle, on
        # average fewer than four times since the domain is less than four times the range.
        self._half_bits = max(1, math.ceil((size - 1).bit_length() / 2))
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
        self._round_keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_FEISTEL_ROUNDS)]

    def __call__(self, index: int) -> int:
        """The image of ``index``, in ``range(size)``."""
        assert 0 <= index < self.size
        while True:
            index = self._encrypt(index)
            if index < self.size:
                return index

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """Finalizer of splitmix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


class Blend:
    """Which source each sample comes from: a periodic table of slots whose counts are exact in every period."""

    def __init__(self, weights: Sequence[float]):
        quotas = _quotas(weights)
        self.period = sum(quotas)
        self._slots = _spread(quotas)
        self._counts_before = np.zeros((self.period + 1, len(quotas)), dtype=np.int64)
        one_hot = np.zeros((self.period, len(quotas)), dtype=np.int64)
        one_hot[np.arange(self.period), self._slots] = 1
        np.cumsum(one_hot, axis=0, out=self._counts_before[1:])

    def source(self, index: int) -> int:
        """Position of the source that sample ``index`` comes from."""
        return int(self._slots[index % self.period])

    def counts(self, index: int) -> list[int]:
        """How many of the first ``index`` samples come from each source."""
        whole, rest = divmod(index, self.period)
        return [int(n) for n in whole * self._counts_before[-1] + self._counts_before[rest]]


def _quotas(weights: Sequence[float]) -> list[int]:
    """Slots of each source in one period, by largest remainder, divided by their greatest common divisor."""
    total = math.fsum(weights)
    exact = [weight / total * BLEND_RESOLUTION for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for position in range(BLEND_RESOLUTION - sum(quotas)):
        quotas[by_remainder[position % len(quotas)]] += 1
    divisor = math.gcd(*quotas)
    return [quota // divisor for quota in quotas]


def _spread(quotas: Sequence[int]) -> np.ndarray:
    """[period] slots in which each source appears ``quotas`` times, as evenly as the greedy rule places them: every
    slot goes to the unfinished source that is furthest behind its share."""
    share = np.asarray(quotas, dtype=np.int64)
    period = int(share.sum())
    taken = np.zeros_like(share)
    slots = np.empty(period, dtype=np.int64)
    for slot in range(period):
        behind = np.where(taken < share, share * (slot + 1) - period * taken, np.iinfo(np.int64).min)
        slots[slot] = chosen = int(behind.argmax())
        taken[chosen] += 1
    return slots


@dataclass(frozen=True)
class OrderedSource:
    """What the order must know of a source."""

    name: str
    num_windows: int
    weight: float


@dataclass(frozen=True)
class Sample:
    """Where one sample lies."""

    source: int
    """Position in the list of sources."""
    epoch: int
    """How often the source had been gone through before."""
    window: int
    """Window of the source."""


class SampleOrder:
    """The sequence of samples of a run.

    Args:
        sources: the blend.
        seed: of the permutations.
        sequence_length: part of the permutations' key, since it decides what a window is.
        start: sample at which this blend took over from a former one.
        cursors: samples that each source (by name) had given before ``start``.
    """

    def __init__(
        self,
        sources: Sequence[OrderedSource],
        seed: int,
        sequence_length: int,
        start: int = 0,
        cursors: Mapping[str, int] | None = None,
    ):
        self.sources = list(sources)
        self.seed = seed
        self.sequence_length = sequence_length
        self.start = start
        self._start_cursors = dict(cursors or {})
        self._blend = Blend([source.weight for source in sources])
        self._permutation = functools.lru_cache(maxsize=2 * len(self.sources))(self._make_permutation)

    def sample(self, index: int) -> Sample:
        """The ``index``-th sample of the run, ``index >= start``."""
        assert index >= self.start
        position = self._blend.source(index - self.start)
        source = self.sources[position]
        given = self._blend.counts(index - self.start)[position] + self._start_cursors.get(source.name, 0)
        epoch, place = divmod(given, source.num_windows)
        return Sample(position, epoch, self._permutation(position, epoch)(place))

    def cursors(self, index: int) -> dict[str, int]:
        """Samples that each source has given among the first ``index`` samples of the run, former sources included."""
        result = dict(self._start_cursors)
        for source, count in zip(self.sources, self._blend.counts(index - self.start), strict=True):
            result[source.name] = result.get(source.name, 0) + count
        return result

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the number of consumed samples."""
        return {
            "start": self.start,
            "cursors": dict(self._start_cursors),
            "weights": {source.name: source.weight for source in self.sources},
        }

    def resumed(self, state: Mapping[str, Any], consumed_samples: int) -> SampleOrder:
        """This order continued from a checkpoint. The same blend goes on where it was; another blend takes over at
        ``consumed_samples``, each source going on from its own cursor."""
        weights = {source.name: source.weight for source in self.sources}
        # Compared as lists: the order of the sources decides ties between slots, so it is part of the blend.
        if list(state["weights"].items()) == list(weights.items()):
            return SampleOrder(self.sources, self.seed, self.sequence_length, state["start"], state["cursors"])
        former_sources = [OrderedSource(name, 1, weight) for name, weight in state["weights"].items()]
        former = SampleOrder(former_sources, self.seed, self.sequence_length, state["start"], state["cursors"])
        cursors = former.cursors(consumed_samples)
        return SampleOrder(self.sources, self.seed, self.sequence_length, consumed_samples, cursors)

    def _make_permutation(self, position: int, epoch: int) -> Permutation:
        source = self.sources[position]
        return Permutation(source.num_windows, f"{self.seed}/{self.sequence_length}/{source.name}/{epoch}")
