"""Keeping held-out texts, such as benchmarks, out of a corpus: documents that share an n-gram with them are refused.

The rule is that of GPT-3 (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C): n-grams of 13
words, without case and punctuation; what a word is, also in scripts without spaces, says shingles.py. As there,
held-out texts of 8 to 12 words are looked for as a whole. Shorter ones are in too many texts by chance: they refuse
only documents that consist of the same words. Unlike there, the whole document is refused, not its surroundings of 200
characters, and an n-gram counts however many documents have it: leave boilerplate out of the held-out files.
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
        # Most of what is looked up is not there: one bit says so, where the binary search would take twenty steps.
        bits = min(max((_BITS_PER_HASH * len(self.sorted)).bit_length(), 10), _MAX_BITS)
        self._shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, np.bool_)
        present[self.sorted >> self._shift] = True
        self._bitmap = np.packbits(present, bitorder="little")

    def __len__(self) -> int:
        return len(self.sorted)

    def find(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Indices, ascending, of those of ``hashes`` [n] that are in the set."""
        if not len(self.sorted):
            return np.empty(0, np.int64)
        slots = hashes >> self._shift
        bits = self._bitmap[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8)
        maybe = np.flatnonzero(bits & 1)
        places = np.minimum(np.searchsorted(self.sorted, hashes[maybe]), len(self.sorted) - 1)
        return maybe[self.sorted[places] == hashes[maybe]]


class NgramFilter:
    """Says which documents share an n-gram with held-out texts. Made by :meth:`build` or :meth:`load`.

    Args:
        ngram: words in an n-gram.
        grams: uint64[n-grams] of the held-out texts, and of those that have less than n words all of it.
        short: uint64[texts, 3] of those of 8 to n - 1 words: the hash of its first 8 words, its number of units, and
            the hash of all of it.
    """

    def __init__(self, ngram: int, grams: npt.NDArray[np.uint64], short: npt.NDArray[np.uint64]) -> None:
        self.ngram = ngram
        self._grams = HashSet(grams)
        self._short = np.unique(short, axis=0)
        self._prefixes = HashSet(self._short[:, 0])

    @staticmethod
    def build(texts: Iterable[str], ngram: int = 13) -> NgramFilter:
        """From held-out texts: each is one that must not be found, not a file of many."""
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
        """From a file that :meth:`save` made."""
        with np.load(path) as arrays:
            return NgramFilter(int(arrays["ngram"]), arrays["grams"], arrays["short"])

    def save(self, path: Path) -> None:
        """Write all of it to ``path`` (in .npz format, whatever its name)."""
        with open_new(path) as file:
            np.savez(file, ngram=np.array(self.ngram), grams=self._grams.sorted, short=self._short)

    @property
    def num_ngrams(self) -> int:
        """Different n-grams, and texts shorter than one."""
        return len(self._grams)

    @property
    def fingerprint(self) -> str:
        """Changes with everything that decides which documents are refused."""
        digest = xxhash.xxh3_128(f"{VERSION};{self.ngram};".encode())
        digest.update(self._grams.sorted.tobytes())
        digest.update(self._short.tobytes())
        return digest.hexdigest()

    def contaminated(self, text: str) -> bool:
        """Whether ``text`` is to be refused. A batch costs less: :meth:`contaminated_batch`."""
        return bool(self.contaminated_batch([text])[0])

    def contaminated_batch(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool[texts]: which are to be refused."""
        result = np.zeros(len(texts), np.bool_)
        for first, stop, units in units_of(texts):
            result[first:stop] = self._hits(units, whole=True)
        for index, text in enumerate(texts):
            if len(text) > BLOCK:
                watch = self.watch()
                result[index] = watch.add(text) or watch.end()
        return result

    def watch(self) -> Watch:
        """For one long text that comes in pieces."""
        return Watch(self)

    def _hits(self, units: Units, whole: bool) -> npt.NDArray[np.bool_]:
        """bool[texts of ``units``]."""
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
        """Whether one of the short texts that begin with ``prefix`` begins at unit ``start`` and ends by ``limit``."""
        first, last = np.searchsorted(self._short[:, 0], [prefix, prefix + np.uint64(1)])
        candidates = self._short[first:last]
        stops = start + candidates[:, 1].astype(np.int64)
        candidates, stops = candidates[stops <= limit], stops[stops <= limit]
        return bool((units.spans(np.full(len(stops), start), stops) == candidates[:, 2]).any())


class Watch:
    """Looks for held-out n-grams in one long text, piece by piece, in bounded memory."""

    def __init__(self, ngrams: NgramFilter) -> None:
        self._filter = ngrams
        self._units = LongUnits(ngrams.ngram)
        self._complete = False

    def add(self, piece: str) -> bool:
        """Take the next piece; True: the text is to be refused."""
        return any(self._hit(units) for units in self._units.add(piece))

    def end(self) -> bool:
        """Whether the rest of the text is to be refused."""
        for units in self._units.end():
            if self._hit(units):
                return True
        # As a whole only what is shorter than an n-gram, for all its characters.
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
    """The rows of those of the texts that are shorter than an n-gram, but not too short to be looked for."""
    sizes = np.diff(units.offsets)
    short = np.flatnonzero((np.diff(units.ngrams(ngram, whole=False)[2]) == 0) & (sizes > 0))
    starts, stops, offsets = units.ngrams(_MIN_WORDS, whole=False)
    short = short[np.diff(offsets)[short] > 0]
    first = offsets[:-1][short]
    whole = units.spans(units.offsets[:-1][short], units.offsets[1:][short])
    prefixes = units.spans(starts[first], stops[first])
    return np.stack([prefixes, sizes[short].astype(np.uint64), whole], axis=1)
