"""Finds duplicates, exact and near, over the whole corpus in bounded memory. The first document of each group is kept.

Exact: documents with the same 128-bit digest. Among 10^9 different ones a collision has a probability of 10^-21.
Near: documents that agree in a band of their MinHash signature (minhash.py). They are not compared further. Documents
that are linked through others form one cluster.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....engine.data.splitmix import GOLDEN, mix64
from ....engine.errors import UserError
from .key_groups import GrowingArray, KeyGroups

MAX_DOCUMENTS = 2**32
_MEMORY_BYTES = 256 << 20
_Keys = Iterable[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]
"""Keys [n, words], and the documents [n] of an array that have them."""


def first_occurrences(
    digests: Iterable[npt.NDArray[np.uint64]], folder: Path, memory_bytes: int = _MEMORY_BYTES
) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield, for each array of ``digests``, which documents are the first with their digest.

    The disk takes 24 bytes per document if their digests do not fit in memory, and a byte per document in any case.

    Args:
        digests: arrays uint64[n, 2], in input order. All are read before the first answer.
        folder: for temporary files.
        memory_bytes: bound on what is sorted at once; it does not change the result.

    Yields:
        bool[n] for each array.
    """

    def keys(part: npt.NDArray[np.uint64]) -> _Keys:
        yield part, np.arange(len(part))

    def drop(keep: npt.NDArray, _earlier: npt.NDArray[np.int64], later: npt.NDArray[np.int64]) -> None:
        keep[later] = False

    def all_kept(documents: npt.NDArray[np.int64]) -> npt.NDArray:
        return np.ones(len(documents), np.bool_)

    for _, keep in _settled(digests, folder, 2, memory_bytes, all_kept, keys, drop):
        yield np.array(keep)


def near_duplicates(
    bands: Iterable[npt.NDArray[np.uint64]], folder: Path, memory_bytes: int = _MEMORY_BYTES
) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield, for each array of ``bands``, which documents are the first of their cluster.

    The disk takes 16 bytes per band of each document if they do not fit in memory, and 4 bytes per document in any
    case. Run it before filters that drop documents by count: if the first document of a cluster is dropped, the whole
    cluster is lost.

    Args:
        bands: arrays uint64[n, bands], in input order; zeros match nothing. All are read before the first answer.
        folder, memory_bytes: see :func:`first_occurrences`.

    Yields:
        bool[n] for each array.

    Raises:
        UserError: there are more than 2^32 documents.
    """

    def keys(part: npt.NDArray[np.uint64]) -> _Keys:
        for number in range(part.shape[1]):
            rows = np.flatnonzero(part[:, number])
            # A band is compared with the same band of other documents only.
            yield mix64(part[rows, number] + np.uint64(number * GOLDEN % 2**64))[:, None], rows

    def own_roots(documents: npt.NDArray[np.int64]) -> npt.NDArray:
        if len(documents) and documents[-1] >= MAX_DOCUMENTS:
            raise UserError(f"--dedup minhash: more than {MAX_DOCUMENTS:,} documents; preprocess them in parts")
        return documents.astype(np.uint32)

    for documents, parents in _settled(bands, folder, 1, memory_bytes, own_roots, keys, unite):
        yield parents == documents


def _settled(
    parts: Iterable[npt.NDArray[np.uint64]],
    folder: Path,
    key_words: int,
    memory_bytes: int,
    initial: Callable[[npt.NDArray[np.int64]], npt.NDArray],
    keys_of: Callable[[npt.NDArray[np.uint64]], _Keys],
    settle: Callable[[npt.NDArray, npt.NDArray[np.int64], npt.NDArray[np.int64]], None],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray]]:
    """Yield, for each of ``parts``, its documents and their states after all pairs with equal keys were settled.

    Args:
        key_words: 64-bit words of a key.
        initial: returns the states of new documents.
        keys_of: returns the keys of a part's documents.
        settle: ``settle(states, earlier, later)`` changes the states of all documents for pairs with equal keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dedup.", dir=folder) as scratch:
        groups = KeyGroups(Path(scratch) / "keys", key_words, memory_bytes)
        states: GrowingArray | None = None
        bounds = [0]
        for part in parts:
            documents = np.arange(bounds[-1], bounds[-1] + len(part))
            new = initial(documents)
            states = states or GrowingArray(Path(scratch) / "states", new.dtype)
            states.append(new)
            for keys, rows in keys_of(part):
                for earlier, later in groups.add(keys, documents[rows]):
                    if len(later):
                        settle(states.map(), earlier, later)
            bounds.append(bounds[-1] + len(part))
        if states is None:
            return
        for earlier, later in groups.end():
            if len(later):
                settle(states.map(), earlier, later)
        answers = states.map()
        for start, stop in itertools.pairwise(bounds):
            yield np.arange(start, stop), answers[start:stop]


def unite(parents: npt.NDArray[np.uint32], earlier: npt.NDArray[np.int64], later: npt.NDArray[np.int64]) -> None:
    """Join sets of documents for all pairs at once, so that the root of each set is its smallest document.

    ``parents`` [documents] is a forest: the parent of a document is itself (a root) or a smaller document. Each round
    puts the larger root of a pair below the smallest root that it is paired with, until each pair has one root (as in
    Shiloach and Vishkin, "An O(log n) Parallel Connectivity Algorithm", 1982).
    """
    ends = np.stack([earlier, later])
    while ends.size:
        roots = _find_roots(parents, ends)
        differ = roots[0] != roots[1]
        ends = np.sort(roots[:, differ], axis=0)
        np.minimum.at(parents, ends[1], ends[0].astype(np.uint32))


def _find_roots(parents: npt.NDArray[np.uint32], documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the roots of ``documents``, of any shape, and put the documents directly below them."""
    while True:
        roots = parents[parents[documents]]
        if np.array_equal(roots, parents[documents]):
            return roots.astype(np.int64)
        # Shortens the paths of what is below these documents too: a path halves in each round.
        parents[documents] = roots
