"""Divide the documents of a dataset into the batches that an evaluation scores: packed as in training, or sliding.

Both ways give ordinary batches, whose masked targets are context. The tokens of a batch are the same number in every
batch, and every rank gets the same number of batches, since ranks compute together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...engine.batch import Batch
from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.loader import chunks_evaluated, validation_batches
from ...engine.data.source import Source
from ...engine.errors import UserError
from ...engine.schedule import BatchPlan
from ...kernels.linear_cross_entropy import IGNORE_INDEX

Int64s = npt.NDArray[np.int64]


class ScoredBatch(NamedTuple):
    """A batch of T tokens, and where its targets are in the dataset."""

    batch: Batch
    documents_T: Int64s
    """[T] document of each target; meaningless where the target is masked."""
    places_T: Int64s
    """[T] number of tokens before each target in its document; meaningless where the target is masked."""


@dataclass(frozen=True)
class WindowPlan:
    """How documents are divided into windows.

    Args:
        batches: sequence length, micro-batch and ranks.
        stride: None: packed as in training. Else a document is alone in its windows, and each window scores this many
            tokens.
        max_tokens: number of tokens of a set to evaluate at most; None: all.
        attend_across_documents: of packed documents.
    """

    batches: BatchPlan
    stride: int | None = None
    max_tokens: int | None = None
    attend_across_documents: bool = False


@dataclass(frozen=True)
class Windows:
    """The batches of one set on this rank."""

    source: Source
    plan: WindowPlan
    data_rank: int
    vocab_size: int
    starts_D: Int64s
    """[documents + 1] first token of each document, and the end."""
    num_tokens: int
    """Tokens that are read."""
    _rows: list[list[_Window]] | None = None

    @property
    def num_batches(self) -> int:
        """Number of batches on each rank."""
        if self._rows is not None:
            return -(-len(self._rows) // self.plan.batches.data_parallel_size)
        batches = self.plan.batches
        _, count = self._chunks()
        return -(-count // (batches.micro_batch_size * batches.data_parallel_size))

    def __iter__(self) -> Iterator[ScoredBatch]:
        return self._packed() if self._rows is None else self._sliding(self._rows)

    def _chunks(self) -> tuple[list[int], int]:
        limit = self._limit
        return chunks_evaluated([self.source], self.source.sequence_length, limit)

    @property
    def _limit(self) -> int:
        return self.source.num_targets if self.plan.max_tokens is None else self.plan.max_tokens

    def _packed(self) -> Iterator[ScoredBatch]:
        """Yield the batches that validation in training evaluates."""
        plan, length = self.plan.batches, self.source.sequence_length
        ends, count = self._chunks()
        across = self.plan.attend_across_documents
        batches = validation_batches([self.source], plan, self.data_rank, self.vocab_size, across, self._limit)
        width = plan.micro_batch_size * plan.data_parallel_size
        for number, (_, batch) in enumerate(batches):
            first = number * width + self.data_rank * plan.micro_batch_size
            places = np.arange(first, first + plan.micro_batch_size)
            chunks_M1 = (places * ends[-1] // count)[:, None]
            targets = (self.source.start + chunks_M1 * length + np.arange(length) + 1).reshape(-1)
            yield self._located(batch, targets)

    def _sliding(self, rows: list[list[_Window]]) -> Iterator[ScoredBatch]:
        plan = self.plan.batches
        for number in range(self.num_batches):
            place = number * plan.data_parallel_size + self.data_rank
            yield self._row(rows[place] if place < len(rows) else [])

    def _row(self, windows: list[_Window]) -> ScoredBatch:
        size = self.plan.batches.micro_batch_size * self.plan.batches.sequence_length
        tokens, targets = np.zeros(size, np.int64), np.full(size, IGNORE_INDEX, np.int64)
        where, at = np.zeros(size, np.int64), 0
        for one in windows:
            ids = self._tokens(one.start, one.stop + 1)
            mask = self.source.dataset.loss_mask(one.start, one.stop + 1)
            here = slice(at, at + one.stop - one.start)
            tokens[here], targets[here] = ids[:-1], ids[1:]
            if mask is not None:
                targets[here][~mask[1:]] = IGNORE_INDEX
            targets[at : at + one.scored - one.start] = IGNORE_INDEX
            where[here] = np.arange(one.start + 1, one.stop + 1)
            at = here.stop
        # No document, not even of padding, may be longer than a window: the model may have no more positions.
        longest = self.plan.batches.sequence_length
        padding = [min(longest, size - start) for start in range(at, size, longest)]
        lengths = [*(one.stop - one.start for one in windows), *padding]
        return self._located(Batch.of_documents(torch.from_numpy(tokens), lengths, torch.from_numpy(targets)), where)

    def _tokens(self, start: int, stop: int) -> Int64s:
        ids = self.source.dataset.tokens(start, stop)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.source.dataset.prefix}.bin: token id {ids.max()} among the tokens {start:,} to {stop:,} is "
                f"outside the model's vocabulary of {self.vocab_size:,}; preprocess the corpus with the model's own "
                "tokenizer"
            )
        return ids

    def _located(self, batch: Batch, targets_T: Int64s) -> ScoredBatch:
        """Return ``batch`` with the documents of its targets, which are at ``targets_T`` in the dataset."""
        documents = np.searchsorted(self.starts_D, targets_T, side="right") - 1
        documents = np.minimum(documents, len(self.starts_D) - 2)  # of places behind the end, which are masked
        return ScoredBatch(batch, documents, targets_T - self.starts_D[documents])


class _Window(NamedTuple):
    """Input tokens [start, stop) of one document, of which the tokens from ``scored`` on have scored targets."""

    start: int
    stop: int
    scored: int


def divide(source: Source, plan: WindowPlan, data_rank: int, vocab_size: int) -> Windows:
    """Return the windows of a set.

    Args:
        source: the set; it may end before its dataset does.
        plan: how it is divided.
        data_rank: this rank's place among those that read different samples.
        vocab_size: of the model.
    """
    starts = document_starts(source.dataset)
    starts = np.minimum(starts[: int(np.searchsorted(starts, source.stop)) + 1], source.stop)
    if plan.stride is None:
        num_tokens = source.stop - source.start
        if plan.max_tokens is not None and plan.max_tokens < source.num_targets:
            _, count = chunks_evaluated([source], source.sequence_length, plan.max_tokens)
            num_tokens = min(num_tokens, count * source.sequence_length)
        return Windows(source, plan, data_rank, vocab_size, starts, num_tokens)
    chosen = _chosen_documents(starts, plan.max_tokens)
    length = plan.batches.sequence_length
    windows = (one for d in chosen for one in _windows(int(starts[d]), int(starts[d + 1]), length, plan.stride))
    rows = _rows(windows, length * plan.batches.micro_batch_size)
    num_tokens = int((starts[chosen + 1] - starts[chosen]).sum())
    return Windows(source, plan, data_rank, vocab_size, starts, num_tokens, rows)


def document_starts(dataset: IndexedDataset) -> Int64s:
    """Return int64 [documents + 1]: the first token of each document, and the number of all tokens.

    As in training, each sequence of the dataset is a document.
    """
    return np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))


def _chosen_documents(starts: Int64s, max_tokens: int | None) -> Int64s:
    """Return all documents, or some that are spread evenly and have about ``max_tokens`` tokens, at least one."""
    count, total = len(starts) - 1, int(starts[-1])
    if max_tokens is None or total <= max_tokens:
        return np.arange(count)
    wanted = max(1, count * max_tokens // total)
    return np.arange(wanted) * count // wanted


def _windows(start: int, stop: int, length: int, stride: int) -> Iterator[_Window]:
    """Yield the windows of the document [start, stop).

    The first scores up to ``length`` tokens, each other one up to ``stride``, after at least ``length - stride`` tokens
    of context. The first token of a document has no context, so it is not scored.
    """
    end = min(start + length, stop - 1)
    if end > start:
        yield _Window(start, end, start)
    while end < stop - 1:
        scored, end = end, min(end + stride, stop - 1)
        yield _Window(end - length, end, scored)


def _rows(windows: Iterator[_Window], size: int) -> list[list[_Window]]:
    """Put windows into rows of at most ``size`` tokens, in order."""
    rows: list[list[_Window]] = []
    left = 0
    for one in windows:
        tokens = one.stop - one.start
        if tokens > left:
            rows.append([])
            left = size
        rows[-1].append(one)
        left -= tokens
    return rows
