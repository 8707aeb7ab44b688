"""How many documents the windows of a source cut, and what they leave out: counted, for summaries and tools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .layout import GROUP_WINDOWS
from .source import Source


class CutCount(NamedTuple):
    """Documents that begin in the windows counted. A document is cut when it does not lie whole in one window."""

    documents: int
    longer: int
    """Of more tokens than a window holds: these are cut however they are packed."""
    cut: int
    """Cut though a window would hold them."""
    tokens_lost: int
    """Tokens of the part that are never an input: behind the last whole window."""


def count_cuts(source: Source, epoch: int = 0, groups: Iterable[int] | None = None) -> CutCount:
    """Count the cut documents of ``source`` in ``epoch``: exactly, going through its whole index (about 2 us a
    document), or in some groups of windows only.

    Args:
        source: as it is trained on; see :meth:`Source.laid_out`.
        epoch: with ``data.shuffle: documents`` each has other cuts.
        groups: numbers of the groups of windows to look at. None: all.
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
        # The last of them may end beyond the group, or beyond the part if that was cut inside a document.
        ends = np.append(begins[1:], source.dataset.next_boundary(stop))[: len(begins)]
        documents += len(begins)
        longer += int((ends - begins > source.sequence_length).sum())
        whole += source.group(number, epoch, width).pieces.num_whole
    covered = source.num_windows * source.sequence_length
    return CutCount(documents, longer, documents - longer - whole, source.stop - source.start - covered)
