"""The quality and repetition rules of Gopher.

Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", 2021, section A.1.1 and table
A1, with the published thresholds. A text is left out by the first rule that it breaks; the rules and their order are
those of datatrove's GopherQualityFilter and GopherRepetitionFilter, except that words are separated by white space.

Scripts without spaces between words (Chinese, Japanese, Thai and others) are outside of the paper: two Han or kana
characters, or four of Thai, Lao, Khmer, Burmese and similar scripts, count as a word, as in ngrams.py. The rule on the
mean length does not apply to them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ..ngrams import HALF_WORDS, QUARTER_WORDS

MAX_CHARACTERS = 4_000_000
"""A longer text is too long even if it has few words, so that memory is bounded."""

_MIN_WORDS, _MAX_WORDS = 50, 100_000
_MIN_MEAN_LENGTH, _MAX_MEAN_LENGTH = 3, 10
_MAX_SYMBOLS_PER_WORD = 0.1
_MAX_BULLET_LINES, _MAX_ELLIPSIS_LINES = 0.9, 0.3
_MIN_WORDS_WITH_LETTERS = 0.8
_MIN_STOP_WORDS = 2
_STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_MAX_DUPLICATES, _MAX_DUPLICATE_CHARACTERS = 0.3, 0.2
"""Of lines and of paragraphs."""
_MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
_MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Shares of the text's characters, by n."""

_ELLIPSES = ("...", "…")
_BULLETS = ("•", "-")
_OTHER_PUNCTUATION = "—–…“”„‘’«»´►∶━《》〈〉「」【】、。！％（），－．／：；？～"  # noqa: RUF001
"""Besides that of ASCII, as in datatrove."""
_NOT_PUNCTUATION = re.compile(f"[^{re.escape(string.punctuation + _OTHER_PUNCTUATION)}]")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH_END = re.compile(r"\n{2,}")
_LINE_END = re.compile(r"\n+")


def _characters_of(ranges: Iterable[tuple[int, int]]) -> str:
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_HALF, _QUARTER = _characters_of(HALF_WORDS), _characters_of(QUARTER_WORDS)
_UNSPACED = re.compile(f"[{_HALF}{_QUARTER}]")
_WORD = re.compile(rf"[{_HALF}]{{1,2}}|[{_QUARTER}]{{1,4}}|[^\s{_HALF}{_QUARTER}]+")


class GopherRules:
    """Returns why a text is left out.

    Args:
        has_stop_words: apply the rule on stop words, which are English.
    """

    def __init__(self, has_stop_words: bool = True) -> None:
        self._has_stop_words = has_stop_words

    def reason(self, text: str) -> str | None:
        """Return the first rule that ``text`` breaks, or None."""
        if len(text) > MAX_CHARACTERS:
            return _TOO_LONG
        is_unspaced = bool(_UNSPACED.search(text))
        words = _WORD.findall(text) if is_unspaced else text.split()
        return self.quality(text, words) or self.repetition(text, words, 0 if is_unspaced else 1)

    def quality(self, text: str, words: Sequence[str]) -> str | None:
        """Apply the rules on words, symbols and lines."""
        counted = [word for word in words if _NOT_PUNCTUATION.search(word)]
        if len(counted) < _MIN_WORDS:
            return f"fewer than {_MIN_WORDS} words"
        if len(counted) > _MAX_WORDS:
            return _TOO_LONG
        lengths = [len(word) for word in counted if not _UNSPACED.match(word)]
        mean = sum(lengths) / len(lengths) if lengths else _MIN_MEAN_LENGTH
        if mean < _MIN_MEAN_LENGTH:
            return f"mean word length below {_MIN_MEAN_LENGTH}"
        if mean > _MAX_MEAN_LENGTH:
            return f"mean word length above {_MAX_MEAN_LENGTH}"
        return self._symbols(text, words) or self._lines(text) or self._vocabulary(words)

    def _symbols(self, text: str, words: Sequence[str]) -> str | None:
        limit = _MAX_SYMBOLS_PER_WORD
        if text.count("#") / len(words) > limit:
            return f"more than {limit} hash signs per word"
        if sum(map(text.count, _ELLIPSES)) / len(words) > limit:
            return f"more than {limit} ellipses per word"
        return None

    def _lines(self, text: str) -> str | None:
        lines = text.splitlines()
        if sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines) > _MAX_BULLET_LINES:
            return f"more than {_MAX_BULLET_LINES:.0%} of lines begin with a bullet"
        if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines) > _MAX_ELLIPSIS_LINES:
            return f"more than {_MAX_ELLIPSIS_LINES:.0%} of lines end with an ellipsis"
        return None

    def _vocabulary(self, words: Sequence[str]) -> str | None:
        if sum(bool(_LETTER.search(word)) for word in words) / len(words) < _MIN_WORDS_WITH_LETTERS:
            return f"fewer than {_MIN_WORDS_WITH_LETTERS:.0%} of words have a letter"
        if self._has_stop_words and len(_STOP_WORDS.intersection(words)) < _MIN_STOP_WORDS:
            return f"fewer than {_MIN_STOP_WORDS} stop words"
        return None

    def repetition(self, text: str, words: Sequence[str], space: int) -> str | None:
        """Apply the rules of table A1; ``space`` characters are between words."""
        for name, parts in (("paragraphs", _PARAGRAPH_END.split(text.strip())), ("lines", _LINE_END.split(text))):
            count, characters = _duplicates(parts)
            if count / len(parts) > _MAX_DUPLICATES:
                return f"duplicate {name}"
            if characters / len(text) > _MAX_DUPLICATE_CHARACTERS:
                return f"characters in duplicate {name}"
        for n, limit in _MAX_TOP_NGRAM.items():
            if _top_ngram_characters(words, n, space) / len(text) > limit:
                return f"most frequent {n}-gram"
        for n, limit in _MAX_DUPLICATE_NGRAMS.items():
            characters = _duplicate_ngram_characters(words, n)
            if characters / len(text) > limit:
                return f"duplicate {n}-grams"
            if not characters:
                break  # longer ones cannot be duplicates
        return None


_TOO_LONG = f"more than {_MAX_WORDS:,} words"


def _duplicates(parts: Iterable[str]) -> tuple[int, int]:
    """Return the number of parts that occur before, and their characters."""
    again = {part: count - 1 for part, count in Counter(parts).items() if count > 1}
    return sum(again.values()), sum(len(part) * count for part, count in again.items())


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _top_ngram_characters(words: Sequence[str], n: int, space: int) -> int:
    """Return the characters of all occurrences of the most frequent n-gram, overlaps counted twice."""
    if len(words) < n:
        return 0
    ((top, count),) = Counter(_ngrams(words, n)).most_common(1)
    return (sum(map(len, top)) + space * (n - 1)) * count


def _duplicate_ngram_characters(words: Sequence[str], n: int) -> int:
    """Return the characters of n-grams that occur before, without overlaps and spaces."""
    ngrams = list(_ngrams(words, n))
    if len(set(ngrams)) == len(ngrams):
        return 0
    seen: set[tuple[str, ...]] = set()
    characters = place = 0
    while place < len(ngrams):
        if ngrams[place] in seen:
            characters += sum(map(len, ngrams[place]))
            place += n
        else:
            seen.add(ngrams[place])
            place += 1
    return characters
