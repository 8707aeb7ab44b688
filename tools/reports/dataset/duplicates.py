"""Count documents that are exact copies of others, in bounded memory; an unbiased estimate for very many documents.

Equal documents have equal hashes. Up to ``CAPACITY`` different documents, all hashes are kept and the count is exact.
Beyond that, only documents whose *hash* falls into a fraction p of all hashes are kept, so a sample contains either all
copies of a text or none. (A random sample of documents would miss most copies: a sample of one tenth contains both of
two copies in one case of a hundred.) The number of different documents is estimated as those in the sample divided by
p; all other documents, whose total is known exactly, are copies. Unlike the copies in the sample divided by p, this
does not depend on whether the sample includes a text with a million copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from .streams import TokenBlock

CAPACITY = 1 << 22
"""Maximum number of hashes kept: 32 bytes each, and some copies. The probability that two of them collide in 64 bits is
one in two million."""
_MOST_REPEATED = 10


@dataclass(frozen=True)
class RepeatedDocument:
    """A document that occurs several times."""

    document: int
    """Number of its first occurrence."""
    copies: int
    """Number of occurrences, the first included."""
    tokens: int
    """Tokens of one occurrence."""


@dataclass(frozen=True)
class DuplicateFacts:
    """Documents with the same tokens as an earlier document."""

    copies: int
    """Documents that deduplication would remove. Estimated if ``part`` < 1."""
    share: float
    """Fraction of the documents."""
    share_error: float
    """Standard error of the estimate; 0 if it is exact."""
    token_share: float
    """Fraction of the tokens that are in copies."""
    token_share_error: float
    part: float
    """Fraction of all hashes that was kept."""
    looked_at: int
    """Documents whose hashes are in it."""
    most_repeated: list[RepeatedDocument]
    """The most frequent documents among these, the most frequent first."""


class DistinctDocuments:
    """Counts different documents during a pass over the dataset.

    Args:
        capacity: maximum number of hashes kept.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._halvings = 0
        self._documents = 0
        self._tokens = 0
        none = np.empty(0, np.int64)
        self._kept = _Kept(none.astype(np.uint64), none, none, none)
        self._new: list[_Kept] = []
        self._num_new = 0
        self._open = xxhash.xxh3_64()
        self._open_tokens = 0

    def add(self, block: TokenBlock) -> None:
        """Count the next documents, or the next part of one."""
        view = memoryview(np.ascontiguousarray(block.tokens).view(np.uint8).data)
        self._tokens += len(block.tokens)
        if block.begins and block.ends:
            edges = ((block.edges - block.edges[0]) * block.tokens.dtype.itemsize).tolist()
            digest = xxhash.xxh3_64_intdigest
            hashes = [digest(view[start:stop]) for start, stop in pairwise(edges)]
            self._add(hashes, block.document, np.diff(block.edges))
            return
        if block.begins:
            self._open, self._open_tokens = xxhash.xxh3_64(), 0
        self._open.update(view)
        self._open_tokens += len(block.tokens)
        if block.ends:
            self._add([self._open.intdigest()], block.document, np.array([self._open_tokens]))

    def facts(self) -> DuplicateFacts:
        """Return the facts."""
        self._merge()
        part = 2.0**-self._halvings
        distinct, documents, tokens = len(self._kept.hashes), self._documents, self._tokens
        # Each different document is kept with probability part: the number of kept ones is binomial.
        spread = (1 - part) / part**2
        lengths = self._kept.tokens.astype(np.float64)
        copies = max(0.0, documents - distinct / part)
        repeated_tokens = max(0.0, tokens - float(lengths.sum()) / part)
        most = np.lexsort((self._kept.first, -self._kept.copies))[:_MOST_REPEATED]
        return DuplicateFacts(
            copies=round(copies),
            share=copies / max(1, documents),
            share_error=math.sqrt(spread * distinct) / max(1, documents),
            token_share=repeated_tokens / max(1, tokens),
            token_share_error=math.sqrt(spread * float((lengths**2).sum())) / max(1, tokens),
            part=part,
            looked_at=int(self._kept.copies.sum()),
            most_repeated=[
                RepeatedDocument(int(self._kept.first[i]), int(self._kept.copies[i]), int(self._kept.tokens[i]))
                for i in most
                if self._kept.copies[i] > 1
            ],
        )

    def _add(self, hashes: Sequence[int], first: int, tokens: npt.NDArray[np.int64]) -> None:
        count = len(hashes)
        self._documents += count
        new = _Kept(
            np.array(hashes, dtype=np.uint64), np.arange(first, first + count), np.ones(count, np.int64), tokens
        ).within(self._halvings)
        self._new.append(new)
        self._num_new += len(new.hashes)
        if self._num_new > self._capacity // 4:
            self._merge()

    def _merge(self) -> None:
        self._kept = _Kept.merged([self._kept, *self._new])
        self._new, self._num_new = [], 0
        while len(self._kept.hashes) > self._capacity:
            self._halvings += 1
            self._kept = self._kept.within(self._halvings)


@dataclass
class _Kept:
    """Documents by hash: number of the first, number of copies, and tokens of one."""

    hashes: npt.NDArray[np.uint64]
    first: npt.NDArray[np.int64]
    copies: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    def within(self, halvings: int) -> _Kept:
        """Return the documents whose hash is in the first of 2 ** ``halvings`` equal ranges."""
        if halvings == 0:
            return self
        here = self.hashes >> np.uint64(64 - halvings) == 0
        return _Kept(self.hashes[here], self.first[here], self.copies[here], self.tokens[here])

    @staticmethod
    def merged(parts: list[_Kept]) -> _Kept:
        """Merge ``parts``, which are in document order, and combine equal hashes."""
        hashes, first, copies, tokens = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("hashes", "first", "copies", "tokens")
        )
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        begins = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)])
        one = order[begins]
        summed = np.add.reduceat(copies[order], begins) if len(begins) else copies
        return _Kept(hashes[begins], first[one], summed, tokens[one])
