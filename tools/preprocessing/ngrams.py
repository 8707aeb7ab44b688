"""N-grams of words as 64-bit hashes, independent of case, punctuation and line breaks.

Decontamination and MinHash use them. A word is a run of letters, marks and digits of the casefolded text in NFC;
everything else separates words. Scripts without spaces count by the character: a Han or kana character is half a word,
one of Thai, Lao, Khmer, Burmese and similar scripts a quarter, which is about the average of these languages. An n-gram
of n words is thus 2n Chinese characters, or a mixture: it begins at each word or character and ends when it weighs n
words.

Python's ``unicodedata`` defines letters. Among 10^9 different n-grams, two have the same hash with a probability of 3
%.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...engine.data.splitmix import GOLDEN, mix64
from .cleaning.normalization import PieceNormalizer

WORD = 4
"""Weight of a word; that of a Han or kana character is 2, that of a Thai character 1."""
BLOCK = 1 << 17
"""Characters hashed at once: few enough for all results to stay in the processor's cache."""
VERSION = f"1, Unicode {unicodedata.unidata_version}"
"""Of the rule above: n-grams of different versions are not comparable."""

_SEPARATOR, _EXPANDED, _IGNORED = 0, 8, 255
HALF_WORDS = (
    *(
        (0x3005, 0x3007),
        (0x3021, 0x3029),
        (0x3038, 0x303A),
        (0x3040, 0x30FF),
        (0x3100, 0x312F),
        (0x31A0, 0x31BF),
        (0x31F0, 0x31FF),
    ),
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF)),
)
QUARTER_WORDS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF)),
    *((0xA980, 0xA9FF), (0xAA60, 0xAADF)),
)
_FIRST_OF_OTHER_CLASSES = 0xAD
"""The soft hyphen, which is ignored. All characters before it are of words, or separators."""
_VARIATION_SELECTORS, _TAGS = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF)), (0xE0000, 0xE007F)
_BASE = np.uint64(0x5851F42D4C957F2D)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


@dataclass(frozen=True)
class Units:
    """The words (and characters that count as part of a word) of some texts."""

    hashes: npt.NDArray[np.uint64]
    """[units]."""
    weights: npt.NDArray[np.int64] | None
    """[units]; None: all are words."""
    offsets: npt.NDArray[np.int64]
    """[texts + 1], the first unit of each text."""

    def ngrams(self, num_words: int, whole: bool = True) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
        """Return the n-grams of each text, in order and with repetitions; :meth:`spans` hashes them.

        Args:
            num_words: n.
            whole: a text that weighs less has one n-gram, all of it (none if it has no units).

        Returns:
            int64[n-grams], the first unit of each; int64[n-grams], its end, exclusive; int64[texts + 1], the first
            n-gram of each text.
        """
        num_units = len(self.hashes)
        starts = np.arange(num_units)
        limits = np.repeat(self.offsets[1:], np.diff(self.offsets))
        if self.weights is None:
            stops = starts + num_words
        else:
            before = _prefix_sums(self.weights)
            # For each weight, the first unit with that much before it: faster than a binary search.
            reached = np.repeat(np.arange(num_units + 1), np.diff(before, prepend=-1))
            wanted = before[:-1] + WORD * num_words
            # Without enough weight: beyond all limits.
            stops = np.where(wanted < len(reached), reached.take(wanted, mode="clip"), num_units + 1)
        valid = stops <= limits
        if whole:
            first = self.offsets[:-1][np.diff(self.offsets) > 0]
            short = first[~valid[first]]
            stops[short] = limits[short]
            valid[short] = True
        starts = np.flatnonzero(valid)
        return starts, stops[starts], np.searchsorted(starts, self.offsets)

    def spans(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Return uint64[spans], hashes of the units from ``starts`` to ``stops``, exclusive."""
        inverses = _powers(len(self.hashes))[1]
        return mix64((self._sums.take(stops) - self._sums.take(starts)) * inverses.take(starts))

    @functools.cached_property
    def _sums(self) -> npt.NDArray[np.uint64]:
        return _prefix_sums(self.hashes * _powers(len(self.hashes))[0][: len(self.hashes)])

    def tail(self, num_words: int) -> Units:
        """Return the last units of the last text, at which no complete n-gram of ``num_words`` begins."""
        weights = np.full(len(self.hashes), WORD) if self.weights is None else self.weights
        behind = np.cumsum(weights[::-1])[::-1]
        start = max(int(np.searchsorted(-behind, -WORD * num_words, side="right")), int(self.offsets[-2]))
        kept = self.hashes[start:]
        return Units(kept, None if self.weights is None else weights[start:], np.array([0, len(kept)]))

    def __add__(self, other: Units) -> Units:
        """Concatenate the units of two parts of a text."""
        weights = None
        if self.weights is not None or other.weights is not None:
            parts = (np.full(len(u.hashes), WORD) if u.weights is None else u.weights for u in (self, other))
            weights = np.concatenate([*parts])
        hashes = np.concatenate([self.hashes, other.hashes])
        return Units(hashes, weights, np.array([0, len(hashes)]))


NO_UNITS = Units(np.empty(0, np.uint64), None, np.zeros(2, np.int64))


def units_of(texts: Sequence[str]) -> Iterator[tuple[int, int, Units]]:
    """Yield (first, stop, units) of the texts [first, stop), about a block at once.

    Texts of more than ``BLOCK`` characters are left out; use :class:`LongUnits` for them.
    """
    first, size = 0, 0
    for index, text in enumerate(texts):
        if size and size + len(text) > BLOCK:
            yield first, index, _hash_texts(texts[first:index])
            first, size = index, 0
        if len(text) > BLOCK:
            first = index + 1
        else:
            size += len(text) + 1
    if first < len(texts):
        yield first, len(texts), _hash_texts(texts[first:])


class LongUnits:
    """Units of one text that comes in pieces, cut anywhere, in memory of a few pieces.

    It yields units of consecutive parts of the text that overlap by less than ``num_words``: the n-grams of all parts
    (``whole=False``) are those of the text, each once. Parts of a word of more than ``BLOCK`` characters may count as
    words.
    """

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words
        self._normalizer = PieceNormalizer()
        self._text = ""
        self._word = ""
        self.carried = NO_UNITS
        """First units of the next part: the whole text while it weighs less than ``num_words``."""

    def add(self, piece: str) -> Iterator[Units]:
        """Add the next piece."""
        return self._take(self._normalizer.add(piece))

    def end(self) -> Iterator[Units]:
        """Yield the last parts."""
        yield from self._take(self._normalizer.end())
        yield self._hash(self._word + self._text)

    def _take(self, normalized: str) -> Iterator[Units]:
        self._text += normalized
        whole = len(self._text) - len(self._text) % BLOCK
        for start in range(0, whole, BLOCK):
            text = self._word + self._text[start : start + BLOCK]
            cut = _last_boundary(text) or len(text)
            self._word = text[cut:]
            yield self._hash(text[:cut])
        self._text = self._text[whole:]

    def _hash(self, text: str) -> Units:
        units = self.carried + _hash_codes(_codes(text), np.array([len(text)]))
        self.carried = units.tail(self._num_words)
        return units


def _last_boundary(text: str) -> int:
    """Return where the last word begins, which may continue after ``text``; 0 if it is the only one."""
    ends = np.flatnonzero(_tables()[1][_codes(text)] < WORD)
    return int(ends[-1]) + 1 if len(ends) else 0


def _hash_texts(texts: Sequence[str]) -> Units:
    normalized = [unicodedata.normalize("NFC", text) for text in texts]
    ends = np.cumsum([len(text) + 1 for text in normalized], dtype=np.int64)
    # A line feed separates words.
    return _hash_codes(_codes("\n".join((*normalized, ""))), ends)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """Return code points [len(text)]."""
    order = "le" if sys.byteorder == "little" else "be"
    return np.frombuffer(text.encode(f"utf-32-{order}", "surrogatepass"), dtype=np.uint32)


def _hash_codes(codes: npt.NDArray[np.uint32], ends: npt.NDArray[np.int64]) -> Units:
    """Return the units of texts whose code points are end to end, up to ``ends`` [texts]. No word crosses an end."""
    values, classes = _tables()
    unspaced = None
    if codes.max(initial=0) >= _FIRST_OF_OTHER_CLASSES:
        kinds = classes.take(codes)
        if (expanded := kinds == _EXPANDED).any():
            codes, ends = _expand(codes, ends, np.flatnonzero(expanded))
            kinds = classes.take(codes)
        if (ignored := kinds == _IGNORED).any():
            ends = _prefix_sums(~ignored)[ends]
            codes, kinds = codes[~ignored], kinds[~ignored]
        unspaced = (kinds == 1) | (kinds == 2)
        if not unspaced.any():
            unspaced = None
    found = values.take(codes)
    inside = found != 0
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    if unspaced is not None:
        begins |= unspaced
        begins[1:] |= inside[1:] & unspaced[:-1]
    starts = np.flatnonzero(begins)
    powers, inverses = _powers(len(codes))
    found *= powers[: len(codes)]
    # From each word's start to the next; separators add zero.
    sums = _prefix_sums(found)
    hashes = np.diff(sums.take(starts), append=sums[-1:]) * inverses.take(starts)
    return Units(
        mix64(hashes),
        None if unspaced is None else kinds.take(starts).astype(np.int64),
        np.concatenate([[0], np.searchsorted(starts, ends)]),
    )


def _expand(
    codes: npt.NDArray[np.uint32], ends: npt.NDArray[np.int64], where: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Return ``codes`` with those at ``where`` casefolded to several each, and the new ends of the texts."""
    folded = [chr(code).casefold() for code in codes[where].tolist()]
    sizes = np.ones(len(codes), np.int64)
    sizes[where] = list(map(len, folded))
    stops = _prefix_sums(sizes)
    result = np.repeat(codes, sizes)
    places = np.repeat(stops[where] - _prefix_sums(sizes[where])[:-1], sizes[where]) + np.arange(sizes[where].sum())
    result[places] = _codes("".join(folded))
    return result, stops[ends]


def _prefix_sums(values: npt.NDArray) -> npt.NDArray:
    """Return [n + 1] exclusive prefix sums: int64 for bool and int64, modulo 2^64 for uint64."""
    sums = np.zeros(len(values) + 1, np.uint64 if values.dtype == np.uint64 else np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Return by code point the value to hash, zero for separators, and the weight of a unit that begins with it.

    Both are of the casefolded character; if that is several characters, the weight is ``_EXPANDED``.
    """
    weights = np.zeros(0x110000, np.uint8)
    for code in range(0x20000):
        category = unicodedata.category(chr(code))
        if category[0] in "LMN":
            weights[code] = WORD
        elif category == "Cf":
            weights[code] = _IGNORED
    weights[0x20000:0x40000] = WORD
    for ranges, weight in ((HALF_WORDS, 2), (QUARTER_WORDS, 1)):
        for first, last in ranges:
            part = weights[first : last + 1]
            part[part == WORD] = weight
    for first, last in (*_VARIATION_SELECTORS, _TAGS):
        weights[first : last + 1] = _IGNORED
    values = mix64(np.arange(1, 0x110001, dtype=np.uint64) * np.uint64(GOLDEN))
    values[(weights == _SEPARATOR) | (weights == _IGNORED)] = 0
    folds = {code: fold for code in range(0x20000) if (fold := chr(code).casefold()) != chr(code)}
    single = [(code, ord(fold)) for code, fold in folds.items() if len(fold) == 1]
    for table in (values, weights):
        table[[code for code, _ in single]] = table[[fold for _, fold in single]]
    weights[[code for code, fold in folds.items() if len(fold) > 1]] = _EXPANDED
    return values, weights


@functools.cache
def _powers_up_to(size: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    powers = [np.ones(size, np.uint64), np.ones(size, np.uint64)]
    for table, base in zip(powers, (_BASE, _INVERSE), strict=True):
        table[1:] = base
        np.cumprod(table, out=table)
    return powers[0], powers[1]


def _powers(size: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return B^i and B^-i modulo 2^64 for 0 <= i < ``size`` or more, of an odd B.

    The hash of a word w is the sum of w[i] B^i at any position, computed as a difference of one prefix sum.
    """
    length = 2 * BLOCK
    while length < size:
        length *= 2
    return _powers_up_to(length)
