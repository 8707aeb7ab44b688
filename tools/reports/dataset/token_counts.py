"""One pass over all tokens: how often each id occurs, what the loss mask leaves out, which documents are copies.

Or, where that would take too long, a sample of the tokens: runs that are spread evenly over the file. It gives shares
with their standard errors, and nothing on documents as wholes: copies cannot be told from a part of the dataset.
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
"""Runs of a sample, and the tokens of each: 67 MB in all with four bytes each."""
READ_WHOLE = 2 * SAMPLE_RUNS * SAMPLE_RUN
"""Tokens up to which a sample is all of them, which takes a second or two."""
LARGEST_ID = 1 << 24
"""Ids from here on are no vocabulary's but damage, and not counted one by one: that would take memory for each."""
_MOST_FREQUENT = 30
_CURVE_POINTS = 200


@dataclass(frozen=True)
class TokenFacts:
    """How often ids occur."""

    tokens: int
    """That were looked at."""
    sampled: bool
    """Whether those are a sample, in runs that are spread evenly over the dataset."""
    used_ids: int
    """Different ids of the vocabulary that occur; in a sample, fewer than in all."""
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
    unknown_error: float
    """Standard error of their share, where it is an estimate."""


@dataclass(frozen=True)
class MaskFacts:
    """The loss mask."""

    predicted: int
    """Tokens that it lets be predicted, of those looked at."""
    share: float
    """Of the tokens."""
    share_error: float
    """Standard error, where it is an estimate."""
    silent_documents: int | None
    """Documents of which no token is to be predicted; None in a sample."""


@dataclass(frozen=True)
class EndFacts:
    """Where the token that ends a document stands."""

    eod_id: int
    ended: int
    """Documents whose last token it is."""
    inside: int
    """Times that it stands elsewhere."""


@dataclass(frozen=True)
class PassFacts:
    """What a pass over all tokens finds, or a sample of them."""

    tokens: TokenFacts
    duplicates: DuplicateFacts | None
    """None in a sample."""
    mask: MaskFacts | None
    """None without a mask."""
    ends: EndFacts | None
    """None in a sample, or where the id is not known."""


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

    def of(self, token: int) -> int:
        """How often the id ``token`` occurs."""
        return int(self._counts[token]) if 0 <= token < len(self._counts) else 0

    def facts(self, vocab_size: int | None, unknown_id: int | None, sampled: bool, unknown_error: float) -> TokenFacts:
        """What was counted."""
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
    """What the loss mask lets be predicted."""

    def __init__(self) -> None:
        self._tokens = self._predicted = self._silent = 0
        self._open = 0

    def add(self, block: TokenBlock) -> None:
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
        return MaskFacts(self._predicted, self._predicted / max(1, self._tokens), 0.0, self._silent)


class EndCounts:
    """Where the token ``eod_id`` stands."""

    def __init__(self, eod_id: int) -> None:
        self._eod_id = eod_id
        self._all = self._ended = 0

    def add(self, block: TokenBlock) -> None:
        """See the next documents, or the next part of one."""
        is_end = block.tokens == self._eod_id
        self._all += int(is_end.sum())
        if block.ends:
            has_tokens = np.diff(block.edges) > 0
            self._ended += int(is_end[block.edges[1:][has_tokens] - block.edges[0] - 1].sum())

    def facts(self) -> EndFacts:
        """What was counted."""
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
        vocab_size: of the tokenizer, where it is known.
        unknown_id: of the tokenizer's unknown token, where there is one.
        eod_id: of the token that ends a document, where it is known.
        block_tokens: tokens that are held at once.
        capacity: different documents that are told apart exactly; see duplicates.py.
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
    """As :func:`count_tokens` where ``dataset`` has at most ``read_whole`` tokens; else from 256 runs of 65,536 tokens
    that are spread evenly, of which a seek and a read each."""
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
    """Standard error of the share of all tokens that ``counts`` in the runs of a sample give.

    By the differences of runs: tokens of a run are of few documents and alike, so they count for less than as many
    single ones. Runs that are spread evenly are at least as good as runs at random.
    """
    return float(counts.std(ddof=1)) / math.sqrt(len(counts)) / SAMPLE_RUN


def _ranks(count: int) -> list[int]:
    """Ranks from 1 to ``count``, evenly spread over their logarithm."""
    if count == 0:
        return []
    marks = np.geomspace(1, count, _CURVE_POINTS)
    return sorted({1, count, *(math.floor(mark) for mark in marks)})
