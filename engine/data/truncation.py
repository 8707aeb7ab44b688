"""Count the documents that a source's chunks cut, and the tokens they leave out, for summaries and tools."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from .document_packing import CHUNKS_PER_GROUP
from .source import Source


@dataclass(frozen=True)
class TruncationCount:
    """Documents that begin in the counted chunks. A document is cut if no single chunk holds all of it."""

    documents: int
    longer: int
    """Documents with more tokens than a chunk; every packing cuts them."""
    truncated: int
    """Cut documents that would fit in a chunk."""
    tokens_dropped: int
    """Tokens at the end of the part that are never an input, because they do not fill a chunk."""
    exact: bool
    """Whether all groups were counted."""


def count_truncated(source: Source, epoch: int = 0, groups: Collection[int] | None = None) -> TruncationCount:
    """Count the cut documents of ``source`` in ``epoch``, exactly, in its whole index or in some groups of chunks.

    Takes about 2 us a document.

    Args:
        source: as used in training; see :meth:`Source.with_packing`.
        epoch: with ``data.shuffle: documents`` every epoch has other cuts.
        groups: numbers of the groups of chunks to count. None: all.
    """
    width = CHUNKS_PER_GROUP if source.packer is None else source.packer.chunks_per_group
    every = range(-(-source.num_chunks // width))
    numbers = every if groups is None else groups
    documents = longer = whole = 0
    for number in numbers:
        start = source.start + number * width * source.sequence_length
        stop = min(start + width * source.sequence_length, source.start + source.num_chunks * source.sequence_length)
        begins = source.dataset.boundaries(start, stop)
        if source.dataset.next_boundary(start) == start:
            begins = np.append(start, begins)
        # The last document may end beyond the group, or beyond the part if the part ends inside a document.
        ends = np.append(begins[1:], source.dataset.next_boundary(stop))[: len(begins)]
        documents += len(begins)
        longer += int((ends - begins > source.sequence_length).sum())
        whole += source.group(number, epoch, width).spans.num_whole
    covered = source.num_chunks * source.sequence_length
    return TruncationCount(
        documents,
        longer,
        documents - longer - whole,
        source.stop - source.start - covered,
        exact=len(numbers) == len(every),
    )
