"""Divide a dataset, or a part of one, into numbered chunks of equal length.

Chunk ``w`` covers the tokens ``[w * S, w * S + S)`` of its part, and the next token of each as its target. Documents
follow each other without padding, so only the tokens of the last partial chunk are lost. With a
:class:`DocumentPacker` the chunks hold the same tokens in total, but the documents of each group of chunks are
rearranged (document_packing.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .document_packing import ChunkGroup, DocumentPacker, Spans, spans_between, split_into_chunks
from .indexed_dataset import IndexedDataset


class Chunk(NamedTuple):
    """One sample before packing. S is the sequence length, or less in the last chunk of a validation set."""

    tokens: npt.NDArray[np.int64]
    """[S] token ids."""
    targets: npt.NDArray[np.int64]
    """[S] token ids: the next token in the document, even across the edge of the chunk. After a document's last token,
    the next token in the chunk."""
    starts: npt.NDArray[np.int64]
    """Positions in 1..S-1 at which another document, or a span of one, begins."""
    ends: npt.NDArray[np.int64]
    """Positions in 0..S-1 of documents' last tokens."""
    predicted: npt.NDArray[np.bool_] | None = None
    """[S] True if the dataset's loss mask makes the target count. None: all count."""
    bos_id: int | None = None
    """The BOS at the beginning of documents, if there is one: it is never a target, not even after the previous
    document."""


@dataclass(frozen=True)
class Source:
    """The tokens ``[start, stop)`` of a dataset, in chunks of ``sequence_length``."""

    name: str
    dataset: IndexedDataset
    sequence_length: int
    start: int
    stop: int
    packer: DocumentPacker | None = None
    """Arrangement of the documents. None: chunks are read in file order, the same in all epochs."""
    bos_id: int | None = None
    """See :attr:`Chunk.bos_id`."""
    loss_weight: float = 1.0
    """Factor of the losses of its tokens in training."""

    @property
    def num_chunks(self) -> int:
        """Number of whole chunks in this part, as used in training."""
        return self.num_targets // self.sequence_length

    @property
    def num_targets(self) -> int:
        """Number of tokens in this part that follow another one, before any masking."""
        return max(0, self.stop - self.start - 1)

    @property
    def num_chunks_with_tail(self) -> int:
        """Number of chunks in this part, including a shorter last one, as used in evaluation."""
        return -(-self.num_targets // self.sequence_length)

    def with_packing(
        self, packing: Literal["concat", "best_fit"], shuffle: Literal["windows", "documents"], seed: int
    ) -> Source:
        """Return this source with chunks made according to ``data.packing`` and ``data.shuffle``."""
        if (packing, shuffle) == ("concat", "windows"):
            return self
        packer = DocumentPacker(
            self.dataset,
            self.start,
            self.num_chunks,
            self.sequence_length,
            f"{seed}/{self.sequence_length}/{self.name}/layout",
            packing,
            every_epoch=shuffle == "documents",
        )
        return dataclasses.replace(self, packer=packer)

    def group(self, number: int, epoch: int, chunks_per_group: int) -> ChunkGroup:
        """Return the spans of documents in the chunks ``[number * chunks_per_group, ...)`` of ``epoch``, for
        counting.
        """
        if self.packer is not None:
            assert chunks_per_group == self.packer.chunks_per_group
            return self.packer.group(number, epoch)
        first = number * chunks_per_group
        count = min(chunks_per_group, self.num_chunks - first)
        start = self.start + first * self.sequence_length
        documents = spans_between(self.dataset, start, start + count * self.sequence_length)
        return split_into_chunks(documents, count, self.sequence_length)

    def chunk(self, index: int, vocab_size: int, epoch: int = 0) -> Chunk:
        """Read chunk ``index`` as in ``epoch``; without a packer the last chunk may be shorter.

        Raises:
            UserError: a token id is outside ``[0, vocab_size)``.
        """
        if self.packer is not None:
            assert 0 <= index < self.num_chunks
            return self._read_spans(self.packer.chunk(index, epoch), vocab_size)
        assert 0 <= index < self.num_chunks_with_tail
        start = self.start + index * self.sequence_length
        stop = min(start + self.sequence_length + 1, self.stop)
        ids = self.dataset.tokens(start, stop)
        self._check(ids, vocab_size, lambda place: start + place)
        boundaries = self.dataset.boundaries(start, stop) - start
        mask = self.dataset.loss_mask(start, stop)
        return Chunk(
            ids[:-1],
            ids[1:],
            boundaries[boundaries < len(ids) - 1],
            boundaries - 1,
            None if mask is None else mask[1:],
            self.bos_id,
        )

    def _read_spans(self, spans: Spans, vocab_size: int) -> Chunk:
        tokens, targets = (np.empty(self.sequence_length, dtype=np.int64) for _ in range(2))
        may_count, counts = (np.ones(self.sequence_length, dtype=np.bool_) for _ in range(2))
        at = 0
        for start, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True):
            here = slice(at, at + length)
            ids = self.dataset.tokens(start, start + length + 1)
            tokens[here], targets[here] = ids[:-1], ids[1:]
            if self.dataset.has_loss_mask:
                mask = self.dataset.loss_mask(start, start + length + 1)
                assert mask is not None
                may_count[here], counts[here] = mask[:-1], mask[1:]
            at += length
        stops = np.cumsum(spans.lengths)

        def position(place: int) -> int:
            span = int(np.searchsorted(stops, place, side="right"))
            return int(spans.starts[span] + place - (stops[span] - spans.lengths[span]))

        self._check(tokens, vocab_size, position)
        self._check(targets, vocab_size, lambda place: position(place) + 1)
        ends = stops[spans.ends] - 1
        # The next token in the chunk after a document's last token; at the end of the chunk there is none.
        inner = ends[ends < self.sequence_length - 1]
        targets[inner], counts[inner] = tokens[inner + 1], may_count[inner + 1]
        counts[ends[len(inner) :]] = False
        return Chunk(tokens, targets, stops[:-1], ends, counts, self.bos_id)

    def _check(self, ids: npt.NDArray[np.int64], vocab_size: int, position: Callable[[int], int]) -> None:
        """Refuse token ``ids`` outside the vocabulary; ``position`` gives the place of the n-th of them in the
        dataset.
        """
        if int(ids.view(np.uint64).max()) >= vocab_size:  # read as unsigned, negative ids are huge
            index = int(((ids < 0) | (ids >= vocab_size)).argmax())
            bad, place = int(ids[index]), position(index)
            raise UserError(
                f"{self.dataset.prefix}.bin: token id {bad} at token {place:,} is outside the model's vocabulary of "
                f"{vocab_size:,}; preprocess the corpus with the model's own tokenizer"
            )


def split_source(name: str, dataset: IndexedDataset, sequence_length: int, held_out: float) -> tuple[Source, Source]:
    """Return (training part, held-out part): the last fraction ``held_out`` of the tokens is held out.

    The cut is at the beginning of a document, so that no document is on both sides.
    """
    cut = dataset.next_boundary(round(dataset.num_tokens * (1 - held_out)))
    return (
        Source(name, dataset, sequence_length, 0, cut),
        Source(name, dataset, sequence_length, cut, dataset.num_tokens),
    )
