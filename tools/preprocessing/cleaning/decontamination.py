"""Decontamination: leaves out documents that share an n-gram with held-out texts, such as benchmarks.

The rule is that of GPT-3 (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C): n-grams of 13
words, without case and punctuation (ngrams.py defines words). Held-out texts of 8 to 12 words must occur as a whole.
Shorter ones are in too many texts by chance: they exclude only documents that consist of the same words. Unlike GPT-3,
the whole document is left out, not 200 characters around the match, and frequent n-grams count too: remove boilerplate
from held-out files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from ....engine.files.outputs import open_new
from ..ngrams import BLOCK, VERSION, LongUnits, Units, units_of

_MIN_WORDS = 8
_BITS_PER_HASH = 16
_MAX_BITS = 27
_BATCH = 1024  # texts


class HashSet:
    """A set of 64-bit hashes, in 8 to 10 bytes each.

    Args:
        hashes: uint64[n], in any order, with repetitions.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64]) -> None:
        self.sorted = np.unique(hashes)
        # Most hashes are not in the set: one bit tells, instead of a binary search of twenty steps.
        bits = min(max((_BITS_PER_HASH * len(self.sorted)).bit_length(), 10), _MAX_BITS)
        self._shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, np.bool_)
        present[self.sorted >> self._shift] = True
        self._bitmap = np.packbits(present, bitorder="little")

    def __len__(self) -> int:
        return len(self.sorted)

    def find(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the ascending indices of those of ``hashes`` [n] that are in the set."""
        if not len(self.sorted):
            return np.empty(0, np.int64)
        slots = hashes >> self._shift
        bits = self._bitmap[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8)
        maybe = np.flatnonzero(bits & 1)
        places = np.minimum(np.searchsorted(self.sorted, hashes[maybe]), len(self.sorted) - 1)
        return maybe[self.sorted[places] == hashes[maybe]]


class NgramFilter:
    """Finds documents that share an n-gram with held-out texts. Made by :meth:`build` or :meth:`load`.

    Args:
        ngram: words in an n-gram.
        grams: uint64[n-grams] of the held-out texts; a text of fewer than n words is one n-gram.
        short: uint64[texts, 3] for texts of 8 to n - 1 words: hash of the first 8 words, number of units, hash of all.
    """

    def __init__(self, ngram: int, grams: npt.NDArray[np.uint64], short: npt.NDArray[np.uint64]) -> None:
        self.ngram = ngram
        self._grams = HashSet(grams)
        self._short = np.unique(short, axis=0)
        self._prefixes = HashSet(self._short[:, 0])

    @staticmethod
    def build(texts: Iterable[str], ngram: int = 13) -> NgramFilter:
        """Build from held-out texts: single texts, not files."""
        grams: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        short: list[npt.NDArray[np.uint64]] = [np.empty((0, 3), np.uint64)]
        for batch in _batches(texts):
            for text in batch:
                if len(text) > BLOCK:
                    long = LongUnits(ngram)
                    parts = [_hashes(part, ngram, False) for part in itertools.chain(long.add(text), long.end())]
                    grams += parts
                    if not any(map(len, parts)):
                        grams.append(_hashes(long.carried, ngram, True))
                        short.append(_short_texts(long.carried, ngram))
            for _, _, units in units_of(batch):
                grams.append(_hashes(units, ngram, True))
                short.append(_short_texts(units, ngram))
        return NgramFilter(ngram, np.concatenate(grams), np.concatenate(short))

    @staticmethod
    def load(path: Path) -> NgramFilter:
        """Load a file that :meth:`save` wrote."""
        with np.load(path) as arrays:
            return NgramFilter(int(arrays["ngram"]), arrays["grams"], arrays["short"])

    def save(self, path: Path) -> None:
        """Write to ``path`` in .npz format."""
        with open_new(path) as file:
            np.savez(file, ngram=np.array(self.ngram), grams=self._grams.sorted, short=self._short)

    @property
    def num_ngrams(self) -> int:
        """Number of different n-grams, and texts shorter than one."""
        return len(self._grams)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which documents are left out."""
        digest = xxhash.xxh3_128(f"{VERSION};{self.ngram};".encode())
        digest.update(self._grams.sorted.tobytes())
        digest.update(self._short.tobytes())
        return digest.hexdigest()

    def contaminated(self, text: str) -> bool:
        """Return whether ``text`` is contaminated. :meth:`contaminated_batch` is faster."""
        return bool(self.contaminated_batch([text])[0])

    def contaminated_batch(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return bool[texts]: which are contaminated."""
        result = np.zeros(len(texts), np.bool_)
        for first, stop, units in units_of(texts):
            result[first:stop] = self._hits(units, whole=True)
        for index, text in enumerate(texts):
            if len(text) > BLOCK:
                watch = self.watch()
                result[index] = watch.add(text) or watch.end()
        return result

    def watch(self) -> LongTextCheck:
        """Return a checker for one long text that comes in pieces."""
        return LongTextCheck(self)

    def _hits(self, units: Units, whole: bool) -> npt.NDArray[np.bool_]:
        """Return bool[texts of ``units``]."""
        starts, stops, offsets = units.ngrams(self.ngram, whole)
        found = self._grams.find(units.spans(starts, stops))
        places = [np.searchsorted(offsets, found, side="right") - 1]
        if len(self._prefixes):
            starts, stops, offsets = units.ngrams(_MIN_WORDS, whole=False)
            prefixes = units.spans(starts, stops)
            for index in self._prefixes.find(prefixes).tolist():
                text = int(np.searchsorted(offsets, index, side="right")) - 1
                if self._has_short(units, int(starts[index]), int(units.offsets[text + 1]), prefixes[index]):
                    places.append(np.array([text]))
        result = np.zeros(len(units.offsets) - 1, np.bool_)
        result[np.concatenate(places)] = True
        return result

    def _has_short(self, units: Units, start: int, limit: int, prefix: np.uint64) -> bool:
        """Return whether a short text with this ``prefix`` hash occurs at unit ``start`` and ends by ``limit``."""
        first, last = np.searchsorted(self._short[:, 0], [prefix, prefix + np.uint64(1)])
        candidates = self._short[first:last]
        stops = start + candidates[:, 1].astype(np.int64)
        candidates, stops = candidates[stops <= limit], stops[stops <= limit]
        return bool((units.spans(np.full(len(stops), start), stops) == candidates[:, 2]).any())


class LongTextCheck:
    """Searches one long text for held-out n-grams, piece by piece, in bounded memory."""

    def __init__(self, ngrams: NgramFilter) -> None:
        self._filter = ngrams
        self._units = LongUnits(ngrams.ngram)
        self._complete = False

    def add(self, piece: str) -> bool:
        """Add the next piece; return whether the text is contaminated."""
        return any(self._hit(units) for units in self._units.add(piece))

    def end(self) -> bool:
        """Return whether the rest of the text is contaminated."""
        for units in self._units.end():
            if self._hit(units):
                return True
        # As a whole only if it is shorter than an n-gram.
        return not self._complete and bool(self._filter._hits(self._units.carried, whole=True)[0])

    def _hit(self, units: Units) -> bool:
        self._complete = self._complete or len(units.ngrams(self._filter.ngram, whole=False)[0]) > 0
        return bool(self._filter._hits(units, whole=False)[0])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH or len(text) > BLOCK:
            yield batch
            batch = []
    yield batch


def _hashes(units: Units, ngram: int, whole: bool) -> npt.NDArray[np.uint64]:
    return np.unique(units.spans(*units.ngrams(ngram, whole)[:2]))


def _short_texts(units: Units, ngram: int) -> npt.NDArray[np.uint64]:
    """Return the rows of ``short`` for the texts of 8 to n - 1 words."""
    sizes = np.diff(units.offsets)
    short = np.flatnonzero((np.diff(units.ngrams(ngram, whole=False)[2]) == 0) & (sizes > 0))
    starts, stops, offsets = units.ngrams(_MIN_WORDS, whole=False)
    short = short[np.diff(offsets)[short] > 0]
    first = offsets[:-1][short]
    whole = units.spans(units.offsets[:-1][short], units.offsets[1:][short])
    prefixes = units.spans(starts[first], stops[first])
    return np.stack([prefixes, sizes[short].astype(np.uint64), whole], axis=1)
