"""One pass over all tokens: how often each id occurs, what the loss mask leaves out, which documents are copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...engine.data.indexed_dataset import IndexedDataset
from ..ingest.progress import ProgressReport
from .duplicates import CAPACITY, DistinctDocuments, DuplicateFacts
from .streams import BLOCK_TOKENS, Block, DatasetStream

LARGEST_ID = 1 << 24
"""Ids from here on are no vocabulary's but damage, and not counted one by one: that would take memory for each."""
_MOST_FREQUENT = 30
_CURVE_POINTS = 200


@dataclass(frozen=True)
class TokenFacts:
    """How often ids occur."""

    tokens: int
    used_ids: int
    """Different ids that occur."""
    vocab_size: int | None
    """Of the tokenizer; None where that is not known."""
    outside_vocab: int | None
    """Tokens with an id beyond the vocabulary or below 0; None where the vocabulary is not known."""
    outside_any: int
    """Tokens with an id of 16,777,216 or more, or below 0: no vocabulary's."""
    most_frequent: list[tuple[int, int]]
    """(id, how often it occurs), the most frequent first."""
    curve: list[tuple[int, int]]
    """(rank, how often the id of this rank occurs) at a few hundred ranks: Zipf's plot."""
    unknown_id: int | None
    """Id of the tokenizer's unknown token; None where it has none or is not known."""
    unknown: int | None
    """Tokens with that id; None as before."""


@dataclass(frozen=True)
class MaskFacts:
    """The loss mask."""

    predicted: int
    """Tokens that it lets be predicted."""
    share: float
    """Of all tokens."""
    silent_documents: int
    """Documents of which no token is to be predicted."""


@dataclass(frozen=True)
class PassFacts:
    """What a pass over all tokens finds."""

    tokens: TokenFacts
    duplicates: DuplicateFacts
    mask: MaskFacts | None


class TokenCounts:
    """How often each id occurs."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, dtype=np.int64)
        self._outside = 0

    def add(self, tokens: npt.NDArray[np.integer]) -> None:
        """Count ``tokens``."""
        if len(tokens) == 0:
            return
        if tokens.min() < 0 or tokens.max() >= LARGEST_ID:
            inside = (tokens >= 0) & (tokens < LARGEST_ID)
            self._outside += len(tokens) - int(inside.sum())
            tokens = tokens[inside]
        counts = np.bincount(tokens, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    def facts(self, vocab_size: int | None, unknown_id: int | None) -> TokenFacts:
        """What was counted."""
        counts, tokens = self._counts, int(self._counts.sum()) + self._outside
        order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        unknown = None
        if unknown_id is not None:
            unknown = int(counts[unknown_id]) if unknown_id < len(counts) else 0
        return TokenFacts(
            tokens=tokens,
            used_ids=len(order),
            vocab_size=vocab_size,
            outside_vocab=None if vocab_size is None else int(counts[vocab_size:].sum()) + self._outside,
            outside_any=self._outside,
            most_frequent=[(int(token), int(counts[token])) for token in order[:_MOST_FREQUENT]],
            curve=[(rank, int(counts[order[rank - 1]])) for rank in _ranks(len(order))],
            unknown_id=unknown_id,
            unknown=unknown,
        )


class MaskCounts:
    """What the loss mask lets be predicted."""

    def __init__(self) -> None:
        self._tokens = self._predicted = self._silent = 0
        self._open = 0

    def add(self, block: Block) -> None:
        """See the next documents, or the next part of one."""
        assert block.mask is not None
        ends = np.concatenate([[0], np.cumsum(block.mask != 0, dtype=np.int64)])
        predicted = np.diff(ends[block.edges - block.edges[0]])
        self._tokens += len(block.mask)
        self._predicted += int(predicted.sum())
        if block.begins and block.ends:
            self._silent += int((predicted == 0).sum())
            return
        self._open = int(predicted[0]) + (0 if block.begins else self._open)
        self._silent += block.ends and self._open == 0

    def facts(self) -> MaskFacts:
        """What was counted."""
        return MaskFacts(self._predicted, self._predicted / max(1, self._tokens), self._silent)


def count_tokens(
    dataset: IndexedDataset,
    vocab_size: int | None,
    unknown_id: int | None,
    block_tokens: int = BLOCK_TOKENS,
    capacity: int = CAPACITY,
) -> PassFacts:
    """Read every token of ``dataset`` once; progress is shown on stderr.

    Args:
        vocab_size: of the tokenizer, where it is known.
        unknown_id: of the tokenizer's unknown token, where there is one.
        block_tokens: tokens that are held at once.
        capacity: different documents that are told apart exactly; see duplicates.py.
    """
    tokens, documents, mask = TokenCounts(), DistinctDocuments(capacity), MaskCounts()
    itemsize = dataset.dtype.itemsize
    done = 0
    with ProgressReport("reading tokens", dataset.num_tokens * itemsize) as progress:
        for block in DatasetStream(dataset, block_tokens).blocks():
            tokens.add(block.tokens)
            documents.add(block)
            if block.mask is not None:
                mask.add(block)
            done += len(block.tokens)
            progress.show(done * itemsize, done)
    return PassFacts(
        tokens.facts(vocab_size, unknown_id), documents.facts(), mask.facts() if dataset.has_loss_mask else None
    )


def _ranks(count: int) -> list[int]:
    """Ranks from 1 to ``count``, evenly spread over their logarithm."""
    if count == 0:
        return []
    marks = np.geomspace(1, count, _CURVE_POINTS)
    return sorted({1, count, *(math.floor(mark) for mark in marks)})
