"""Count the documents that a source's windows cut, and the tokens they leave out, for summaries and tools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .document_packing import GROUP_WINDOWS
from .source import Source


class CutCount(NamedTuple):
    """Documents that begin in the counted windows. A document is cut if no single window holds all of it."""

    documents: int
    longer: int
    """Documents with more tokens than a window; every packing cuts them."""
    cut: int
    """Cut documents that would fit in a window."""
    tokens_lost: int
    """Tokens at the end of the part that are never an input, because they do not fill a window."""


def count_cuts(source: Source, epoch: int = 0, groups: Iterable[int] | None = None) -> CutCount:
    """Count the cut documents of ``source`` in ``epoch``, exactly, in its whole index or in some groups of windows.

    Takes about 2 us a document.

    Args:
        source: as used in training; see :meth:`Source.laid_out`.
        epoch: with ``data.shuffle: documents`` every epoch has other cuts.
        groups: numbers of the groups of windows to count. None: all.
    """
    width = GROUP_WINDOWS if source.layout is None else source.layout.group_windows
    numbers = range(-(-source.num_windows // width)) if groups is None else groups
    documents = longer = whole = 0
    for number in numbers:
        start = source.start + number * width * source.sequence_length
        stop = min(start + width * source.sequence_length, source.start + source.num_windows * source.sequence_length)
        begins = source.dataset.boundaries(start, stop)
        if source.dataset.next_boundary(start) == start:
            begins = np.append(start, begins)
        # The last document may end beyond the group, or beyond the part if the part ends inside a document.
        ends = np.append(begins[1:], source.dataset.next_boundary(stop))[: len(begins)]
        documents += len(begins)
        longer += int((ends - begins > source.sequence_length).sum())
        whole += source.group(number, epoch, width).pieces.num_whole
    covered = source.num_windows * source.sequence_length
    return CutCount(documents, longer, documents - longer - whole, source.stop - source.start - covered)
