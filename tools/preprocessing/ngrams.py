"""N-grams of words as 64-bit hashes: what two texts have in common, whatever their case, punctuation and line breaks.

One rule for decontamination.py and near_dedup.py. A word is a run of letters, marks and digits of the text in NFC and
casefolded; everything else only separates words. Scripts that do not separate words are counted by the character: a
Han or kana character as half a word, one of Thai, Lao, Khmer, Burmese and their like as a quarter, which is about what
words of these languages have. An n-gram of n words is thus 2n Chinese characters, or a mixture: it begins at each word
or character and ends as soon as it weighs n words.

What is a letter is a matter of this Python's ``unicodedata``. Among 10^9 different n-grams two have the same hash with
a probability of 3 %.
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
"""Characters hashed at once: few enough for all that is computed from them to stay in the processor's cache."""
VERSION = f"1, Unicode {unicodedata.unidata_version}"
"""Of the rule above: n-grams of different versions are not to be compared."""

_SEPARATOR, _EXPANDED, _IGNORED = 0, 8, 255
_HALF_WORDS = (
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
_QUARTER_WORDS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF)),
    *((0xA980, 0xA9FF), (0xAA60, 0xAADF)),
)
_FIRST_OF_OTHER_CLASSES = 0xAD
"""Characters before are of words, or separate them; this is the soft hyphen, which is ignored."""
_VARIATION_SELECTORS, _TAGS = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF)), (0xE0000, 0xE007F)
_BASE = np.uint64(0x5851F42D4C957F2D)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


@dataclass(frozen=True)
class Units:
    """The words (and characters that count as parts of words) of some texts."""

    hashes: npt.NDArray[np.uint64]
    """[units]."""
    weights: npt.NDArray[np.int64] | None
    """[units]; None: all are words."""
    offsets: npt.NDArray[np.int64]
    """[texts + 1], the first unit of each text."""

    def ngrams(self, num_words: int, whole: bool = True) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
        """The n-grams of each text, in order and with repetitions.

        Args:
            num_words: n.
            whole: a text that weighs less has one, which is all of it (none when it has no units).

        Returns:
            starts int64[n-grams], the unit that each begins with; stops int64[n-grams], where it ends, exclusive; and
            int64[texts + 1] with the first n-gram of each text. Their hashes are those of :meth:`spans`.
        """
        num_units = len(self.hashes)
        starts = np.arange(num_units)
        limits = np.repeat(self.offsets[1:], np.diff(self.offsets))
        if self.weights is None:
            stops = starts + num_words
        else:
            before = _prefix_sums(self.weights)
            # For each weight the first unit before which there is as much: what a binary search would find, sooner.
            reached = np.repeat(np.arange(num_units + 1), np.diff(before, prepend=-1))
            wanted = before[:-1] + WORD * num_words
            # Where there is not enough weight: beyond all limits.
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
        """uint64[spans], hashes of the units from ``starts`` to before ``stops``."""
        inverses = _powers(len(self.hashes))[1]
        return mix64((self._sums.take(stops) - self._sums.take(starts)) * inverses.take(starts))

    @functools.cached_property
    def _sums(self) -> npt.NDArray[np.uint64]:
        return _prefix_sums(self.hashes * _powers(len(self.hashes))[0][: len(self.hashes)])

    def tail(self, num_words: int) -> Units:
        """Of the last text those units at the end in which no n-gram of ``num_words`` begins that is complete."""
        weights = np.full(len(self.hashes), WORD) if self.weights is None else self.weights
        behind = np.cumsum(weights[::-1])[::-1]
        start = max(int(np.searchsorted(-behind, -WORD * num_words, side="right")), int(self.offsets[-2]))
        kept = self.hashes[start:]
        return Units(kept, None if self.weights is None else weights[start:], np.array([0, len(kept)]))

    def __add__(self, other: Units) -> Units:
        """Of one text each: the text of both."""
        weights = None
        if self.weights is not None or other.weights is not None:
            parts = (np.full(len(u.hashes), WORD) if u.weights is None else u.weights for u in (self, other))
            weights = np.concatenate([*parts])
        hashes = np.concatenate([self.hashes, other.hashes])
        return Units(hashes, weights, np.array([0, len(hashes)]))


NO_UNITS = Units(np.empty(0, np.uint64), None, np.zeros(2, np.int64))


def units_of(texts: Sequence[str]) -> Iterator[tuple[int, int, Units]]:
    """Units of ``texts``, of as many at once as make up a block.

    Yields:
        (first, stop, units) of the texts [first, stop): all texts in order, but those of more than ``BLOCK``
        characters are left out, of which a caller makes n-grams by :class:`LongUnits`.
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
    """Units of one text that comes in pieces, cut anywhere; memory is bounded by some pieces.

    What it yields are units of consecutive parts of the text that overlap by less than ``num_words``, so that the
    n-grams of all parts (``whole=False``) are those of the text, each once. How the text was cut makes no difference.
    Of a word of more than ``BLOCK`` characters parts may count as words.
    """

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words
        self._normalizer = PieceNormalizer()
        self._text = ""
        self._word = ""
        self.carried = NO_UNITS
        """Units that the next part begins with: all of the text as long as it weighs less than ``num_words``."""

    def add(self, piece: str) -> Iterator[Units]:
        """Take the next piece."""
        return self._take(self._normalizer.add(piece))

    def end(self) -> Iterator[Units]:
        """The last parts."""
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
    """Where the last word begins that may go on behind ``text``; 0 when it is the only one."""
    ends = np.flatnonzero(_tables()[1][_codes(text)] < WORD)
    return int(ends[-1]) + 1 if len(ends) else 0


def _hash_texts(texts: Sequence[str]) -> Units:
    normalized = [unicodedata.normalize("NFC", text) for text in texts]
    ends = np.cumsum([len(text) + 1 for text in normalized], dtype=np.int64)
    # A line feed separates words.
    return _hash_codes(_codes("\n".join((*normalized, ""))), ends)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """Code points [len(text)]."""
    order = "le" if sys.byteorder == "little" else "be"
    return np.frombuffer(text.encode(f"utf-32-{order}", "surrogatepass"), dtype=np.uint32)


def _hash_codes(codes: npt.NDArray[np.uint32], ends: npt.NDArray[np.int64]) -> Units:
    """Units of texts of which the code points lie end to end, up to ``ends`` [texts]; no word goes over an end."""
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
    # From each word's start to the next one's; what lies between words adds zero.
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
    """``codes`` with those at ``where`` casefolded to several each, and the ends of the texts then."""
    folded = [chr(code).casefold() for code in codes[where].tolist()]
    sizes = np.ones(len(codes), np.int64)
    sizes[where] = list(map(len, folded))
    stops = _prefix_sums(sizes)
    result = np.repeat(codes, sizes)
    places = np.repeat(stops[where] - _prefix_sums(sizes[where])[:-1], sizes[where]) + np.arange(sizes[where].sum())
    result[places] = _codes("".join(folded))
    return result, stops[ends]


def _prefix_sums(values: npt.NDArray) -> npt.NDArray:
    """[n + 1]: the sum of those before each; of bool and int64 in int64, of uint64 modulo 2^64."""
    sums = np.zeros(len(values) + 1, np.uint64 if values.dtype == np.uint64 else np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """By code point: the value that is hashed, zero for separators; and the weight of a unit that begins with it.

    Both are those of the casefolded character. Where these are several ``_EXPANDED`` takes the weight's place.
    """
    weights = np.zeros(0x110000, np.uint8)
    for code in range(0x20000):
        category = unicodedata.category(chr(code))
        if category[0] in "LMN":
            weights[code] = WORD
        elif category == "Cf":
            weights[code] = _IGNORED
    weights[0x20000:0x40000] = WORD
    for ranges, weight in ((_HALF_WORDS, 2), (_QUARTER_WORDS, 1)):
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
    """B^i and B^-i modulo 2^64 for 0 <= i < ``size`` or more, of an odd B.

    With them sums over words become differences of one prefix sum: the hash of a word w is sum w[i] B^i wherever it is.
    """
    length = 2 * BLOCK
    while length < size:
        length *= 2
    return _powers_up_to(length)
