"""Near-duplicates: documents that share most of their word n-grams, found by MinHash and locality-sensitive hashing.

A document's signature estimates the Jaccard similarity of its set of n-grams (shingles.py) to others' (Broder, "On the
Resemblance and Containment of Documents", 1997). It is cut into bands of some rows; documents that agree in a band are
taken for near-duplicates (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4), without a second look,
and so are documents that are linked by others. Of each such cluster the first document in input order is kept.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....engine.data.splitmix import GOLDEN, mix64
from ....engine.errors import UserError
from ..ngrams import BLOCK, VERSION, LongUnits, Units, units_of
from .key_groups import GrowingArray, KeyGroups, Pairs

MAX_DOCUMENTS = 2**32
_RENSA_ALGORITHM = 2
_STEPS = 1000


class MinHasher:
    """Computes the bands of texts.

    Args:
        threshold: Jaccard similarity above which documents shall be found, 0 < threshold < 1. Number and size of the
            bands are chosen by it; see :meth:`probability`.
        num_permutations: values in a signature, of which bands x rows are used.
        ngram: words in an n-gram; a shorter text is one n-gram.
        seed: of the hash functions.

    Raises:
        UserError: the library rensa is not there, or computes other signatures than this module expects.
    """

    def __init__(self, threshold: float = 0.8, num_permutations: int = 128, ngram: int = 5, seed: int = 1) -> None:
        assert 0 < threshold < 1
        self._num_permutations, self._ngram, self._seed = num_permutations, ngram, seed
        self.num_bands, self.num_rows = choose_bands(threshold, num_permutations)
        self._signature = _load_rensa().digest_matrix_from_flat_token_hashes

    @property
    def fingerprint(self) -> str:
        """Names everything that decides the bands; those of different fingerprints are not to be compared."""
        return (
            f"rensa {_RENSA_ALGORITHM}, {self._num_permutations} permutations, {self.num_bands} x {self.num_rows}, "
            f"{self._ngram}-grams {VERSION}, seed {self._seed}"
        )

    def probability(self, similarity: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Probability that two documents of this Jaccard similarity agree in a band: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - np.asarray(similarity, np.float64) ** self.num_rows) ** self.num_bands

    def bands(self, text: str) -> npt.NDArray[np.uint64]:
        """uint64[num_bands] of one text. A batch costs less: :meth:`bands_batch`."""
        return self.bands_batch([text])[0]

    def bands_batch(self, texts: Sequence[str]) -> npt.NDArray[np.uint64]:
        """Bands of many texts.

        Returns:
            uint64[texts, num_bands]: a hash of each band; zero, which agrees with nothing, for texts without words.
        """
        result = np.zeros((len(texts), self.num_bands), np.uint64)
        for first, stop, units in units_of(texts):
            result[first:stop] = self._hash_bands(self._signatures(units, whole=True))
        for index, text in enumerate(texts):
            if len(text) > BLOCK:
                result[index] = self.bands_of_pieces([text])
        return result

    def bands_of_pieces(self, pieces: Iterable[str]) -> npt.NDArray[np.uint64]:
        """uint64[num_bands] of one long text that comes in pieces, cut anywhere; memory is bounded by some pieces."""
        long = LongUnits(self._ngram)
        signature = self._signatures(long.carried, whole=True)
        for units in itertools.chain.from_iterable(itertools.chain(map(long.add, pieces), [long.end()])):
            # The signature of a union is the minimum of the signatures.
            signature = np.minimum(signature, self._signatures(units, whole=False))
        if (signature == _NOTHING).all():
            signature = self._signatures(long.carried, whole=True)
        return self._hash_bands(signature)[0]

    def _signatures(self, units: Units, whole: bool) -> npt.NDArray[np.uint32]:
        """uint32[texts, permutations]."""
        starts, stops, offsets = units.ngrams(self._ngram, whole)
        matrix = self._signature(
            units.spans(starts, stops), offsets.astype(np.uint64), self._num_permutations, self._seed
        )
        size = (len(offsets) - 1) * self._num_permutations
        flat = itertools.chain.from_iterable(matrix.to_rows())
        return np.fromiter(flat, np.uint32, size).reshape(-1, self._num_permutations)

    def _hash_bands(self, signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        used = signatures[:, : self.num_bands * self.num_rows].astype(np.uint64)
        rows = used.reshape(len(signatures), self.num_bands, self.num_rows)
        hashes = np.zeros(rows.shape[:2], np.uint64)
        for row in range(self.num_rows):
            hashes = mix64(hashes + rows[:, :, row] + np.uint64(GOLDEN))
        hashes[hashes == 0] = 1
        hashes[(signatures == _NOTHING).all(axis=1)] = 0
        return hashes


_NOTHING = np.uint32(2**32 - 1)  # all values of the signature of an empty set


def choose_bands(threshold: float, num_permutations: int) -> tuple[int, int]:
    """Number of bands and rows that err least at ``threshold``.

    The error is the probability integrated over similarities below the threshold of agreeing in a band, plus over those
    above it of agreeing in none, as in datasketch's MinHashLSH with equal weights.
    """
    best, choice = np.inf, (1, 1)
    below = (np.arange(_STEPS) + 0.5) * (threshold / _STEPS)
    above = threshold + (np.arange(_STEPS) + 0.5) * ((1 - threshold) / _STEPS)
    for bands in range(1, num_permutations + 1):
        for rows in range(1, num_permutations // bands + 1):
            false_positive = (1 - (1 - below**rows) ** bands).mean() * threshold
            false_negative = ((1 - above**rows) ** bands).mean() * (1 - threshold)
            if (error := (false_positive + false_negative) / 2) < best:
                best, choice = error, (bands, rows)
    return choice


def near_duplicates(
    bands: Iterable[npt.NDArray[np.uint64]], folder: Path, memory_bytes: int = 256 << 20
) -> Iterator[npt.NDArray[np.bool_]]:
    """Say which documents are the first ones of their clusters.

    Documents that share a band are in one cluster, and so are all that are linked in this way. All bands are read
    before the first answer comes. Memory is bounded by about ``memory_bytes``, one array and 4 bytes for each document
    in a mapped file; the disk takes another 16 bytes for each band of each document when they do not fit.

    Comes before filters that drop documents by count: where the first of a cluster is dropped all of it is gone.

    Args:
        bands: arrays uint64[n, bands], in input order; zeros agree with nothing.
        folder: where a folder for temporary files is made, which is removed at the end of the iteration.
        memory_bytes: bound of what is sorted at once; it makes no difference to the result.

    Yields:
        For each array of ``bands`` bool[n].

    Raises:
        UserError: there are more than 2^32 documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="near-dedup.", dir=folder) as scratch:
        parents = GrowingArray(Path(scratch) / "parents", np.uint32)
        groups = KeyGroups(Path(scratch) / "keys", 1, memory_bytes)

        def link(pairs: Iterator[Pairs]) -> None:
            for earlier, later in pairs:
                if len(later):
                    unite(parents.map(), earlier, later)

        sizes = []
        total = 0
        for part in bands:
            stop = total + len(part)
            if stop > MAX_DOCUMENTS:
                raise UserError(f"--dedup minhash: more than {MAX_DOCUMENTS:,} documents; preprocess them in parts")
            parents.append(np.arange(total, stop, dtype=np.uint32))
            for number in range(part.shape[1]):
                rows = np.flatnonzero(part[:, number])
                # A band agrees with the same band of others only.
                keys = mix64(part[rows, number] + np.uint64(number * GOLDEN % 2**64))
                link(groups.add(keys[:, None], total + rows))
            sizes.append(len(part))
            total = stop
        link(groups.end())
        answers = parents.map()
        total = 0
        for size in sizes:
            yield answers[total : total + size] == np.arange(total, total + size)
            total += size


def unite(parents: npt.NDArray[np.uint32], earlier: npt.NDArray[np.int64], later: npt.NDArray[np.int64]) -> None:
    """Join sets of documents pair by pair, all pairs at once, so that the root of each set is its smallest document.

    ``parents`` [documents] is a forest in which each document's parent is itself, a root, or a smaller one. In each
    round the greater root of a pair is hung below the smallest root that it is paired with; it ends when each pair has
    one root (as in Shiloach and Vishkin, "An O(log n) Parallel Connectivity Algorithm", 1982).
    """
    ends = np.stack([earlier, later])
    while ends.size:
        roots = _find_roots(parents, ends)
        differ = roots[0] != roots[1]
        ends = np.sort(roots[:, differ], axis=0)
        np.minimum.at(parents, ends[1], ends[0].astype(np.uint32))


def _find_roots(parents: npt.NDArray[np.uint32], documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Roots of ``documents``, of any shape, which are hung directly below them."""
    while True:
        roots = parents[parents[documents]]
        if np.array_equal(roots, parents[documents]):
            return roots.astype(np.int64)
        # What hangs below these is brought nearer too, so that a path halves in each round.
        parents[documents] = roots


def _load_rensa() -> Any:
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("--dedup minhash needs rensa: pip install 'rensa>=0.5,<0.6'") from None
    version = getattr(RMinHash, "ALGORITHM_VERSION", None)
    if version != _RENSA_ALGORITHM:
        raise UserError(
            f"--dedup minhash: rensa's algorithm is version {version}, not {_RENSA_ALGORITHM}: "
            "pip install 'rensa>=0.5,<0.6'"
        )
    return RMinHash
