"""Exact duplicates: of all documents with the same digest the first in input order is kept.

Two documents with one 128-bit digest are taken for the same; among 10^9 different ones that happens with a probability
of 10^-21.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .key_groups import GrowingArray, KeyGroups, Pairs


def first_occurrences(
    digests: Iterable[npt.NDArray[np.uint64]], folder: Path, memory_bytes: int = 256 << 20
) -> Iterator[npt.NDArray[np.bool_]]:
    """Say which documents are the first ones with their digest.

    All digests are read before the first answer comes. Memory is bounded by about ``memory_bytes``, one array and a
    byte for each document in a mapped file; the disk takes another 24 bytes for each document when they do not fit.

    Args:
        digests: arrays uint64[n, 2], in input order.
        folder: where a folder for temporary files is made, which is removed at the end of the iteration.
        memory_bytes: bound of what is sorted at once; it makes no difference to the result.

    Yields:
        For each array of ``digests`` bool[n].
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="exact-dedup.", dir=folder) as scratch:
        keep = GrowingArray(Path(scratch) / "keep", np.bool_)
        groups = KeyGroups(Path(scratch) / "keys", 2, memory_bytes)

        def drop(pairs: Iterator[Pairs]) -> None:
            for _, later in pairs:
                if len(later):
                    keep.map()[later] = False

        sizes = []
        total = 0
        for part in digests:
            keep.append(np.ones(len(part), np.bool_))
            drop(groups.add(part, np.arange(total, total + len(part))))
            sizes.append(len(part))
            total += len(part)
        drop(groups.end())
        answers = keep.map()
        total = 0
        for size in sizes:
            yield np.array(answers[total : total + size])
            total += size
