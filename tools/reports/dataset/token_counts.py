"""Count token ids, loss-mask targets, document ends and copies in one pass over all tokens.

Or read only a sample: runs of tokens evenly spread over the file. A sample gives shares with standard errors, but
nothing about whole documents, because copies cannot be found in a part of the dataset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....engine.data.indexed_dataset import IndexedDataset
from ...preprocessing.progress import ProgressReport
from .duplicates import CAPACITY, DistinctDocuments, DuplicateFacts
from .streams import BLOCK_TOKENS, DatasetStream, TokenBlock

SAMPLE_RUNS, SAMPLE_RUN = 256, 1 << 16
"""Runs of a sample, and tokens of each run: 67 MB with four bytes a token."""
READ_WHOLE = 2 * SAMPLE_RUNS * SAMPLE_RUN
"""Datasets of up to this many tokens are read whole, which takes a second or two."""
LARGEST_ID = 1 << 24
"""Larger ids are damage, since no vocabulary has them; they are not counted one by one, to save memory."""
_MOST_FREQUENT = 30
_CURVE_POINTS = 200


@dataclass(frozen=True)
class TokenFacts:
    """Frequencies of token ids."""

    tokens: int
    """Number of tokens read."""
    sampled: bool
    """Whether only runs of tokens, evenly spread over the dataset, were read."""
    used_ids: int
    """Number of different ids of the vocabulary that occur; a sample contains fewer than the dataset."""
    vocab_size: int | None
    """Size of the tokenizer's vocabulary; None if unknown."""
    outside_vocab: int | None
    """Tokens with an id outside the vocabulary; None if the vocabulary is unknown."""
    outside_any: int
    """Tokens with an id of 16,777,216 or more, or below 0, which no vocabulary has."""
    most_frequent: list[tuple[int, int]]
    """(id, occurrences), the most frequent first."""
    curve: list[tuple[int, int]]
    """(rank, occurrences of the id of this rank) at a few hundred ranks, for a Zipf plot."""
    unknown_id: int | None
    """Id of the tokenizer's unknown token; None without one or without a tokenizer."""
    unknown: int | None
    """Tokens with that id; None without one."""
    unknown_error: float
    """Standard error of their share; 0 if it is exact."""


@dataclass(frozen=True)
class MaskFacts:
    """Facts about the loss mask."""

    predicted: int
    """Number of targets among the tokens read."""
    share: float
    """Fraction of the tokens read."""
    share_error: float
    """Standard error; 0 if the share is exact."""
    silent_documents: int | None
    """Documents without targets; None for a sample."""


@dataclass(frozen=True)
class EndFacts:
    """Occurrences of the token that ends documents."""

    eod_id: int
    ended: int
    """Documents that end with it."""
    inside: int
    """Its occurrences elsewhere."""


@dataclass(frozen=True)
class PassFacts:
    """Facts from a pass over all tokens, or over a sample."""

    tokens: TokenFacts
    duplicates: DuplicateFacts | None
    """None for a sample."""
    mask: MaskFacts | None
    """None without a loss mask."""
    ends: EndFacts | None
    """None for a sample, or if the id is unknown."""


class TokenCounts:
    """Counts the occurrences of each id."""

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

    def of(self, token: int) -> int:
        """Return the occurrences of the id ``token``."""
        return int(self._counts[token]) if 0 <= token < len(self._counts) else 0

    def facts(self, vocab_size: int | None, unknown_id: int | None, sampled: bool, unknown_error: float) -> TokenFacts:
        """Return the facts."""
        counts, tokens = self._counts, int(self._counts.sum()) + self._outside
        order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        return TokenFacts(
            tokens=tokens,
            sampled=sampled,
            used_ids=int((counts[:vocab_size] > 0).sum()),
            vocab_size=vocab_size,
            outside_vocab=None if vocab_size is None else int(counts[vocab_size:].sum()) + self._outside,
            outside_any=self._outside,
            most_frequent=[(int(token), int(counts[token])) for token in order[:_MOST_FREQUENT]],
            curve=[(rank, int(counts[order[rank - 1]])) for rank in _ranks(len(order))],
            unknown_id=unknown_id,
            unknown=None if unknown_id is None else self.of(unknown_id),
            unknown_error=unknown_error,
        )


class MaskCounts:
    """Counts the targets that the loss mask leaves."""

    def __init__(self) -> None:
        self._tokens = self._predicted = self._silent = 0
        self._open = 0

    def add(self, block: TokenBlock) -> None:
        """Count the next documents, or the next part of one."""
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
        """Return the facts."""
        return MaskFacts(self._predicted, self._predicted / max(1, self._tokens), 0.0, self._silent)


class EndCounts:
    """Counts where the token ``eod_id`` occurs."""

    def __init__(self, eod_id: int) -> None:
        self._eod_id = eod_id
        self._all = self._ended = 0

    def add(self, block: TokenBlock) -> None:
        """Count the next documents, or the next part of one."""
        is_end = block.tokens == self._eod_id
        self._all += int(is_end.sum())
        if block.ends:
            has_tokens = np.diff(block.edges) > 0
            self._ended += int(is_end[block.edges[1:][has_tokens] - block.edges[0] - 1].sum())

    def facts(self) -> EndFacts:
        """Return the facts."""
        return EndFacts(self._eod_id, self._ended, self._all - self._ended)


def count_tokens(
    dataset: IndexedDataset,
    vocab_size: int | None = None,
    unknown_id: int | None = None,
    eod_id: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    capacity: int = CAPACITY,
) -> PassFacts:
    """Read every token of ``dataset`` once; progress is shown on stderr.

    Args:
        vocab_size: of the tokenizer, if known.
        unknown_id: of the tokenizer's unknown token, if it has one.
        eod_id: of the token that ends documents, if known.
        block_tokens: tokens held in memory at once.
        capacity: number of different documents up to which duplicates are exact; see duplicates.py.
    """
    tokens, documents, mask = TokenCounts(), DistinctDocuments(capacity), MaskCounts()
    ends = None if eod_id is None else EndCounts(eod_id)
    itemsize = dataset.dtype.itemsize
    done = 0
    with ProgressReport("reading tokens", dataset.num_tokens * itemsize) as progress:
        for block in DatasetStream(dataset, block_tokens).blocks():
            tokens.add(block.tokens)
            documents.add(block)
            if ends is not None:
                ends.add(block)
            if block.mask is not None:
                mask.add(block)
            done += len(block.tokens)
            progress.show(done * itemsize, done)
    return PassFacts(
        tokens.facts(vocab_size, unknown_id, sampled=False, unknown_error=0.0),
        documents.facts(),
        mask.facts() if dataset.has_loss_mask else None,
        None if ends is None else ends.facts(),
    )


def sample_tokens(
    dataset: IndexedDataset,
    vocab_size: int | None = None,
    unknown_id: int | None = None,
    eod_id: int | None = None,
    read_whole: int = READ_WHOLE,
) -> PassFacts:
    """Like :func:`count_tokens` if ``dataset`` has at most ``read_whole`` tokens; otherwise read 256 evenly spread runs
    of 65,536 tokens, with one seek each.
    """
    if dataset.num_tokens <= max(read_whole, SAMPLE_RUNS * SAMPLE_RUN):
        return count_tokens(dataset, vocab_size, unknown_id, eod_id)
    counts = TokenCounts()
    unknown, predicted = np.zeros(SAMPLE_RUNS), np.zeros(SAMPLE_RUNS)
    for run in range(SAMPLE_RUNS):
        start = (dataset.num_tokens - SAMPLE_RUN) * run // (SAMPLE_RUNS - 1)
        ids = dataset.tokens(start, start + SAMPLE_RUN)
        counts.add(ids)
        unknown[run] = 0 if unknown_id is None else (ids == unknown_id).sum()
        mask = dataset.loss_mask(start, start + SAMPLE_RUN)
        predicted[run] = 0 if mask is None else mask.sum()
    share = float(predicted.mean()) / SAMPLE_RUN
    mask_facts = MaskFacts(int(predicted.sum()), share, _share_error(predicted), None)
    return PassFacts(
        counts.facts(vocab_size, unknown_id, sampled=True, unknown_error=_share_error(unknown)),
        duplicates=None,
        mask=mask_facts if dataset.has_loss_mask else None,
        ends=None,
    )


def _share_error(counts: npt.NDArray[np.float64]) -> float:
    """Return the standard error of a share estimated from ``counts``, one for each run of a sample.

    It follows from the differences between runs, because tokens of one run come from few documents and are alike.
    Evenly spread runs are at least as accurate as random ones.
    """
    return float(counts.std(ddof=1)) / math.sqrt(len(counts)) / SAMPLE_RUN


def _ranks(count: int) -> list[int]:
    """Return ranks from 1 to ``count``, evenly spread over their logarithm."""
    if count == 0:
        return []
    marks = np.geomspace(1, count, _CURVE_POINTS)
    return sorted({1, count, *(math.floor(mark) for mark in marks)})
