"""Check every entry of an index: lengths, pointers and document indices, against each other and the size of .bin.

One pass over the index in bounded memory takes about 5 ns a sequence (0.5 s for 100 million, 2 GB of index). Two
layouts are valid. In *file order*, which every writer produces, each sequence begins at the end of the previous one. In
any other order, such as a filtered or permuted index, every sequence must be inside .bin; Megatron-LM reads such files
sequence by sequence (scattered.py). Everything else is damage. Token ids are not checked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .file_entries import FileEntries

CHECKED_AT_ONCE = 1 << 13
"""Entries of a block. Larger arrays would be mapped and unmapped by malloc each time: four times as slow."""
_SPREAD_BLOCKS = 32

DAMAGED = "the index is damaged; build or copy the dataset again"


@dataclass(frozen=True)
class IndexEntries:
    """The arrays of an index file, and the facts that they must agree with."""

    idx_path: str
    bin_path: str
    lengths: FileEntries
    pointers: FileEntries
    document_indices: FileEntries
    bin_size: int
    itemsize: int

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks of ``CHECKED_AT_ONCE`` sequences."""
        return -(-len(self.lengths) // CHECKED_AT_ONCE)

    def spread_blocks(self) -> list[int]:
        """Return the numbers of some blocks, evenly spread, the first and the last included."""
        last = self.num_blocks - 1
        return sorted({last * step // (_SPREAD_BLOCKS - 1) for step in range(_SPREAD_BLOCKS)}) if last >= 0 else []


def count_displaced(entries: IndexEntries, blocks: Iterable[int]) -> int:
    """Return how many sequences of ``blocks`` do not begin at the end of the previous one (the first: at byte 0).

    Raises:
        UserError: names the first sequence that is not inside .bin.
    """
    return sum(_count_in_block(entries, block * CHECKED_AT_ONCE) for block in blocks)


def _count_in_block(entries: IndexEntries, first: int) -> int:
    lengths = entries.lengths[first : first + CHECKED_AT_ONCE]
    pointers = entries.pointers[first : first + CHECKED_AT_ONCE].astype(np.int64, copy=False)
    sizes = lengths * np.int64(entries.itemsize)
    ends = pointers + sizes
    previous = 0
    if first:
        previous = entries.pointers[first - 1] + entries.lengths[first - 1] * entries.itemsize
    displaced = int(pointers[0] != previous) + int(np.count_nonzero(pointers[1:] != ends[:-1]))
    # For sequences in file order, checking their ends is enough: sums within one block cannot overflow.
    if displaced or lengths.min() < 0 or not 0 <= pointers[0] <= ends[-1] <= entries.bin_size:
        outside = (lengths < 0) | (pointers < 0) | (pointers > entries.bin_size - sizes)
        wrong = outside | (pointers % entries.itemsize != 0)
        if wrong.any():
            _refuse(entries, first + int(wrong.argmax()), bool(outside[wrong.argmax()]))
    return displaced


def _refuse(entries: IndexEntries, sequence: int, outside: bool) -> None:
    length, pointer = entries.lengths[sequence], entries.pointers[sequence]
    problem = (
        f"which is not inside {entries.bin_path} of {entries.bin_size} bytes"
        if outside
        else f"which is not a multiple of {entries.itemsize}, the size of a token"
    )
    raise UserError(
        f"{entries.idx_path}: sequence {sequence} of length {length} points to byte {pointer}, {problem}: {DAMAGED}"
    )


def document_problem(entries: IndexEntries, ends_only: bool = False) -> str | None:
    """Return why the document indices do not ascend from 0 to N, or None if they do."""
    indices, count = entries.document_indices, len(entries.lengths)
    if not len(indices):
        return "is empty"
    if (indices[0], indices[len(indices) - 1]) != (0, count):
        return f"runs from {indices[0]} to {indices[len(indices) - 1]}, not from 0 to {count}"
    previous = 0
    for first in range(0, 0 if ends_only else len(indices), CHECKED_AT_ONCE):
        here = indices[first : first + CHECKED_AT_ONCE]
        if here[0] < previous or (here[1:] < here[:-1]).any():
            at = int((np.diff(here, prepend=previous) < 0).argmax())
            return f"falls to {here[at]} at entry {first + at}"
        previous = int(here[-1])
    return None


def require_token_size(entries: IndexEntries) -> None:
    """Refuse an index that would be in file order with another token size, since its dtype code is wrong.

    Sequences that all have one length prove nothing: they may be every second sequence of a dataset.

    Raises:
        UserError: with both sizes.
    """
    sizes, found = {1, 2, 4, 8} - {entries.itemsize}, set[int]()
    for first in range(0, len(entries.lengths) - 1, CHECKED_AT_ONCE):
        pointers = entries.pointers[first : first + CHECKED_AT_ONCE + 1]
        lengths = entries.lengths[first : first + len(pointers) - 1].astype(np.int64)
        found |= {int(lengths.min()), int(lengths.max())}
        steps = np.diff(pointers)
        sizes = {size for size in sizes if (steps == lengths * size).all()}
        if not sizes:
            return
    if len(found) > 1:
        raise UserError(
            f"{entries.idx_path}: its dtype code means {entries.itemsize} bytes a token, but its pointers fit "
            f"{min(sizes)} bytes a token: the code is wrong; {DAMAGED}"
        )
