"""Compute the order of training samples as a pure function of (seed, sources, stages, sequence length).

Sample ``i`` of the run is looked up in O(1) from its number alone: no index files, no shuffled array, no state.
Therefore the order does not depend on the number of ranks, the micro-batch, worker threads or the length of the run. A
resume needs only one number.

Two techniques make this possible. The curriculum (curriculum.py, mixture.py) gives the source of a sample, and the
number of samples that the source has given before. A *Feistel network* permutes the order of a source's chunks in
every epoch (Black and Rogaway, 2002, "Ciphers with Arbitrary Finite Domains").
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .curriculum import Curriculum
from .splitmix import mix64_of

_FEISTEL_ROUNDS = 6


class Permutation:
    """A keyed bijection on ``range(size)``, evaluated one element at a time in constant memory."""

    def __init__(self, size: int, key: str):
        assert size >= 1
        self.size = size
        # The network permutes 2 * half_bits bits. Values outside the range are permuted again until they fall inside,
        # on average fewer than four times, since the domain is less than four times the range.
        self._half_bits = max(1, math.ceil((size - 1).bit_length() / 2))
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
        self._round_keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_FEISTEL_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the image of ``index``, in ``range(size)``."""
        assert 0 <= index < self.size
        while True:
            index = self._encrypt(index)
            if index < self.size:
                return index

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mix64_of(right ^ key) & self._half_mask)
        return left << self._half_bits | right


@dataclass(frozen=True)
class SourceSize:
    """The properties of a source that its order depends on."""

    name: str
    num_chunks: int


@dataclass(frozen=True)
class Sample:
    """The place of one sample in the data."""

    source: int
    """Position of the source in the list of sources."""
    epoch: int
    """Number of completed passes over the source."""
    chunk: int
    """Number of the chunk in the source."""


class SampleOrder:
    """The sequence of samples of a run.

    Args:
        sources: all sources of the curriculum.
        curriculum: gives the source of each sample.
        seed: of the permutations.
        sequence_length: part of the permutations' key, since chunks depend on it.
    """

    def __init__(self, sources: Sequence[SourceSize], curriculum: Curriculum, seed: int, sequence_length: int):
        self.sources = list(sources)
        self.curriculum = curriculum
        self.seed = seed
        self.sequence_length = sequence_length
        self._positions = {source.name: position for position, source in enumerate(self.sources)}
        self._permutation = functools.lru_cache(maxsize=2 * len(self.sources))(self._make_permutation)

    def sample(self, index: int) -> Sample:
        """Return the ``index``-th sample of the run, from the curriculum's ``start`` to its ``end``."""
        name, given = self.curriculum.lookup(index)
        position = self._positions[name]
        epoch, place = divmod(given, self.sources[position].num_chunks)
        return Sample(position, epoch, self._permutation(position, epoch)(place))

    def cursors(self, index: int) -> dict[str, int]:
        """Return the samples that each source has given among the first ``index`` of the run, earlier sources
        included.
        """
        return self.curriculum.cursors(index)

    def require(self, samples: int, budget_key: str = "training.train_tokens") -> None:
        """Refuse a run of more ``samples`` than stages and caps allow. ``budget_key`` names its length in errors.

        Raises:
            UserError: with both sides of the arithmetic.
        """
        self.curriculum.require(samples, self.sequence_length, budget_key)

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, apart from the number of consumed samples."""
        return self.curriculum.state()

    def resumed(self, state: Mapping[str, Any], consumed_samples: int, former_length: int | None = None) -> SampleOrder:
        """Return this order continued from a checkpoint; see :meth:`Curriculum.resumed`.

        Args:
            state: see :meth:`state`.
            consumed_samples: of the checkpoint.
            former_length: tokens in each of these samples, if it has changed. The next sample is then the one after the
                same number of tokens, in whole samples of the new length.
        """
        length = former_length or self.sequence_length
        curriculum = self.curriculum.resumed(state, consumed_samples, length, self.sequence_length)
        return SampleOrder(self.sources, curriculum, self.seed, self.sequence_length)

    def _make_permutation(self, position: int, epoch: int) -> Permutation:
        source = self.sources[position]
        return Permutation(source.num_chunks, f"{self.seed}/{self.sequence_length}/{source.name}/{epoch}")
