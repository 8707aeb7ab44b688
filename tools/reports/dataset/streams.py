"""Read a dataset from start to end in bounded memory.

Files are read, not mapped: pages of a mapped file count as the process's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ....engine.data.index_format import HEADER
from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.errors import UserError
from ...preprocessing.dataset_writer import FileArray

BLOCK_TOKENS = 4 << 20
"""Tokens held in memory at once: 32 MB, and some copies."""
_DOCUMENTS_AT_ONCE = 1 << 16
_SEQUENCES_AT_ONCE = 4 << 20


class TokenBlock(NamedTuple):
    """Some consecutive whole documents, or a part of a document that is longer than a block."""

    document: int
    """Number of the first document."""
    edges: npt.NDArray[np.int64]
    """[documents + 1] positions at which the documents begin, and at which the last one ends."""
    tokens: npt.NDArray[np.integer]
    """Token ids in the file's dtype."""
    mask: npt.NDArray[np.integer] | None
    """One byte per token; None without a loss mask."""
    begins: bool
    """Whether the first document begins here."""
    ends: bool
    """Whether the last document ends here."""


class DatasetStream:
    """Iterates over the documents of ``dataset``; can be repeated."""

    def __init__(self, dataset: IndexedDataset, block_tokens: int = BLOCK_TOKENS) -> None:
        self.dataset = dataset
        self._block_tokens = block_tokens
        self._lengths = FileArray(dataset.idx_path, "<i4", HEADER.size, dataset.num_sequences)

    def edges(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the positions at which the documents [``first``, ``stop``) begin, and at which the last one ends."""
        indices = self.dataset.document_edges(first, stop)
        low, high = int(indices[0]), int(indices[-1])
        if high - low > _SEQUENCES_AT_ONCE and stop - first > 1:  # very many sequences in a document
            middle = (first + stop) // 2
            return np.concatenate([self.edges(first, middle)[:-1], self.edges(middle, stop)])
        start = self.dataset.sequence_start(low)
        if stop - first == 1:
            return np.array([start, self.dataset.sequence_start(high)])
        ends = np.cumsum(self._lengths[low:high], dtype=np.int64)
        return start + np.concatenate([[0], ends])[indices - low]

    def all_edges(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield (number of the first document, edges) for consecutive groups of documents."""
        for first in range(0, self.dataset.num_documents, _DOCUMENTS_AT_ONCE):
            yield first, self.edges(first, min(first + _DOCUMENTS_AT_ONCE, self.dataset.num_documents))

    def blocks(self) -> Iterator[TokenBlock]:
        """Yield all documents with their tokens, in order."""
        for first, edges in self.all_edges():
            at = 0
            while at < len(edges) - 1:
                stop = int(np.searchsorted(edges, edges[at] + self._block_tokens, side="right")) - 1
                if stop > at:
                    yield self._block(first + at, edges[at : stop + 1], True, True)
                    at = stop
                else:
                    yield from self._parts(first + at, int(edges[at]), int(edges[at + 1]))
                    at += 1

    def _parts(self, document: int, start: int, stop: int) -> Iterator[TokenBlock]:
        for low in range(start, stop, self._block_tokens):
            high = min(low + self._block_tokens, stop)
            yield self._block(document, np.array([low, high]), low == start, high == stop)

    def _block(self, document: int, edges: npt.NDArray[np.int64], begins: bool, ends: bool) -> TokenBlock:
        start, stop = int(edges[0]), int(edges[-1])
        tokens, mask = self.dataset.stored_tokens(start, stop), self.dataset.stored_mask(start, stop)
        return TokenBlock(document, edges, tokens, mask, begins, ends)


def document_edges(dataset: IndexedDataset, index: int) -> tuple[int, int]:
    """Return the token positions at which document ``index`` begins and ends.

    Raises:
        UserError: there is no such document.
    """
    if not 0 <= index < dataset.num_documents:
        held = f"documents 0 to {dataset.num_documents - 1}" if dataset.num_documents else "no documents"
        raise UserError(f"--index {index}: {dataset.prefix} has {held}; choose another")
    start, stop = DatasetStream(dataset).edges(index, index + 1).tolist()
    return start, stop
