"""MinHash signatures of texts, cut into bands that near-duplicates share.

A signature estimates the Jaccard similarity of two documents' sets of word n-grams (ngrams.py; Broder, "On the
Resemblance and Containment of Documents", 1997). It is cut into bands of some rows; two documents are near-duplicates
if they agree in a whole band (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ....engine.data.splitmix import GOLDEN, mix64
from ....engine.errors import UserError, install_command
from ..ngrams import BLOCK, VERSION, LongUnits, Units, units_of

_RENSA_ALGORITHM = 2
_STEPS = 1000


class MinHasher:
    """Computes the bands of texts.

    Args:
        threshold: Jaccard similarity above which documents should be found, 0 < threshold < 1. It determines the number
            and size of bands; see :meth:`probability`.
        num_permutations: values in a signature, of which bands x rows are used.
        ngram: words in an n-gram; a shorter text is one n-gram.
        seed: of the hash functions.

    Raises:
        UserError: the library rensa is missing, or has another algorithm.
    """

    def __init__(self, threshold: float = 0.8, num_permutations: int = 128, ngram: int = 5, seed: int = 1) -> None:
        assert 0 < threshold < 1
        self._num_permutations, self._ngram, self._seed = num_permutations, ngram, seed
        self.num_bands, self.num_rows = choose_bands(threshold, num_permutations)
        self._signature = _load_rensa().digest_matrix_from_flat_token_hashes

    @property
    def fingerprint(self) -> str:
        """Identifies everything that decides the bands; only bands with equal fingerprints are comparable."""
        return (
            f"rensa {_RENSA_ALGORITHM}, {self._num_permutations} permutations, {self.num_bands} x {self.num_rows}, "
            f"{self._ngram}-grams {VERSION}, seed {self._seed}"
        )

    def probability(self, similarity: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the probability that two documents of this similarity share a band: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - np.asarray(similarity, np.float64) ** self.num_rows) ** self.num_bands

    def bands(self, text: str) -> npt.NDArray[np.uint64]:
        """Return uint64[num_bands] of one text. :meth:`bands_batch` is faster."""
        return self.bands_batch([text])[0]

    def bands_batch(self, texts: Sequence[str]) -> npt.NDArray[np.uint64]:
        """Return uint64[texts, num_bands]: a hash of each band; zero, which matches nothing, for texts without
        words.
        """
        result = np.zeros((len(texts), self.num_bands), np.uint64)
        for first, stop, units in units_of(texts):
            result[first:stop] = self._hash_bands(self._signatures(units, whole=True))
        for index, text in enumerate(texts):
            if len(text) > BLOCK:
                result[index] = self.bands_of_pieces([text])
        return result

    def bands_of_pieces(self, pieces: Iterable[str]) -> npt.NDArray[np.uint64]:
        """Return uint64[num_bands] of one long text in pieces, cut anywhere, in memory of a few pieces."""
        long = LongUnits(self._ngram)
        signature = self._signatures(long.carried, whole=True)
        for units in itertools.chain.from_iterable(itertools.chain(map(long.add, pieces), [long.end()])):
            # The signature of a union is the minimum of the signatures.
            signature = np.minimum(signature, self._signatures(units, whole=False))
        if (signature == _NOTHING).all():
            signature = self._signatures(long.carried, whole=True)
        return self._hash_bands(signature)[0]

    def _signatures(self, units: Units, whole: bool) -> npt.NDArray[np.uint32]:
        """Return uint32[texts, permutations]."""
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
    """Return the number of bands and rows with the least error at ``threshold``.

    The error is the probability of sharing a band integrated over similarities below the threshold, plus that of
    sharing none integrated over those above it, as in datasketch's MinHashLSH with equal weights.
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


def _load_rensa() -> Any:
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError(f"--dedup minhash needs rensa: {install_command('rensa')}") from None
    version = getattr(RMinHash, "ALGORITHM_VERSION", None)
    if version != _RENSA_ALGORITHM:
        raise UserError(
            f"--dedup minhash: rensa's algorithm is version {version}, not {_RENSA_ALGORITHM}: "
            "pip install 'rensa>=0.5,<0.6'"
        )
    return RMinHash
