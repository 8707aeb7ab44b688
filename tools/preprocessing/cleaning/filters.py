"""The filters that leave a text out by its content, each with the reason that is counted."""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..options import PreprocessOptions
from .decontamination import LongTextCheck, NgramFilter
from .gopher import MAX_CHARACTERS, GopherRules
from .languages import IDENTIFIED_CHARACTERS, LanguageIdentifier

_SHORT, _CONTAMINATED = "below --min-chars", "shares an n-gram with --held-out"
_FEW_LETTERS = "below --min-letter-ratio"
_OTHER_LANGUAGE, _UNCERTAIN = "in none of --languages", "below --min-language-score"


class TextFilter(Protocol):
    """A rule that leaves texts out."""

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """Return the reason to leave out each text, or None."""

    def watch(self) -> Watch:
        """Return the same check for one long text that comes in pieces."""


class Watch(Protocol):
    """Checks one long text that comes in pieces, in bounded memory."""

    reason: str | None
    """The reason to leave the text out, once it is certain."""

    @property
    def is_settled(self) -> bool:
        """Whether the rest of the text cannot change ``reason``."""

    def add(self, piece: str) -> None:
        """Add the next piece."""

    def end(self) -> None:
        """Decide: there are no more pieces."""


def text_filters(options: PreprocessOptions, held_out: Path | None) -> list[TextFilter]:
    """Return the filters that ``options`` ask for, in their order; ``held_out`` is the file of an NgramFilter."""
    filters: list[TextFilter] = []
    if options.min_chars > 0:
        filters.append(MinChars(options.min_chars))
    if options.min_letter_ratio > 0:
        filters.append(MinLetterRatio(options.min_letter_ratio))
    if options.languages:
        filters.append(Languages(options.languages, options.min_language_score))
    if options.quality != "none":
        filters.append(Quality(options.quality))
    if held_out is not None:
        filters.append(HeldOut(NgramFilter.load(held_out)))
    return filters


class MinChars:
    """``--min-chars``: leaves out texts with fewer code points."""

    def __init__(self, least: int) -> None:
        self._least = least

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """See :class:`TextFilter`."""
        return [_SHORT if len(text) < self._least else None for text in texts]

    def watch(self) -> Watch:
        """See :class:`TextFilter`."""
        return _LengthWatch(self._least)


class _LengthWatch:
    def __init__(self, least: int) -> None:
        self.reason: str | None = None
        self._missing = least

    @property
    def is_settled(self) -> bool:
        return self._missing <= 0

    def add(self, piece: str) -> None:
        self._missing -= len(piece)

    def end(self) -> None:
        self.reason = _SHORT if self._missing > 0 else None


class MinLetterRatio:
    """``--min-letter-ratio``: leaves out texts with too small a share of letters among the visible characters.

    Letters are Unicode's categories L and M (marks, such as vowel signs); white space does not count.
    """

    def __init__(self, least: float) -> None:
        self._least = least

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """See :class:`TextFilter`."""
        return [self.reason(*count_letters(text)) for text in texts]

    def reason(self, letters: int, visible: int) -> str | None:
        """Return the reason to leave out a text with these counts, or None."""
        return _FEW_LETTERS if letters < self._least * visible else None

    def watch(self) -> Watch:
        """See :class:`TextFilter`."""
        return _LettersWatch(self)


class _LettersWatch:
    is_settled = False

    def __init__(self, rule: MinLetterRatio) -> None:
        self.reason: str | None = None
        self._rule, self._letters, self._visible = rule, 0, 0

    def add(self, piece: str) -> None:
        letters, visible = count_letters(piece)
        self._letters += letters
        self._visible += visible

    def end(self) -> None:
        self.reason = self._rule.reason(self._letters, self._visible)


def count_letters(text: str) -> tuple[int, int]:
    """Return the number of letters in ``text``, and of characters that are not white space."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = np.bincount(_kinds().take(codes), minlength=3)
    return int(kinds[_LETTER]), int(kinds[_LETTER] + kinds[_OTHER])


_SPACE, _OTHER, _LETTER = range(3)


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """Return uint8[code points]."""
    kinds = np.full(sys.maxunicode + 1, _OTHER, np.uint8)
    for code, character in enumerate(map(chr, range(sys.maxunicode + 1))):
        if character.isspace():
            kinds[code] = _SPACE
        elif unicodedata.category(character)[0] in "LM":
            kinds[code] = _LETTER
    return kinds


class Languages:
    """``--languages``: leaves out texts in other languages, and those whose language is uncertain."""

    def __init__(self, wanted: Sequence[str], min_score: float) -> None:
        self._wanted, self._min_score = frozenset(wanted), min_score
        self._identifier = LanguageIdentifier()

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """See :class:`TextFilter`."""
        return [self.reason(text) for text in texts]

    def reason(self, text: str) -> str | None:
        """Return the reason to leave out ``text``, or None."""
        language, score = self._identifier.identify(text)
        if score < self._min_score:
            return _UNCERTAIN
        return None if language in self._wanted else _OTHER_LANGUAGE

    def watch(self) -> Watch:
        """See :class:`TextFilter`."""
        return _BeginningWatch(self, IDENTIFIED_CHARACTERS)


class Quality:
    """``--quality``: leaves out texts by the rules of Gopher."""

    def __init__(self, choice: str) -> None:
        self._rules = GopherRules(has_stop_words=choice == "gopher")

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """See :class:`TextFilter`."""
        return [self.reason(text) for text in texts]

    def reason(self, text: str) -> str | None:
        """Return the reason to leave out ``text``, or None."""
        reason = self._rules.reason(text)
        return None if reason is None else f"gopher: {reason}"

    def watch(self) -> Watch:
        """See :class:`TextFilter`. A text of more than ``MAX_CHARACTERS`` is left out whatever follows."""
        return _BeginningWatch(self, MAX_CHARACTERS + 1)


class _BeginningWatch:
    """Applies a rule that reads at most the first ``size`` characters."""

    def __init__(self, rule: Languages | Quality, size: int) -> None:
        self.reason: str | None = None
        self.is_settled = False
        self._rule, self._size, self._text = rule, size, ""

    def add(self, piece: str) -> None:
        if not self.is_settled:
            self._text += piece[: self._size - len(self._text)]
            if len(self._text) == self._size:
                self.end()

    def end(self) -> None:
        if not self.is_settled:
            self.reason, self.is_settled, self._text = self._rule.reason(self._text), True, ""


class HeldOut:
    """``--held-out``: leaves out texts that share an n-gram with held-out texts."""

    def __init__(self, ngrams: NgramFilter) -> None:
        self._ngrams = ngrams

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """See :class:`TextFilter`."""
        return [_CONTAMINATED if hit else None for hit in self._ngrams.contaminated_batch(texts).tolist()]

    def watch(self) -> Watch:
        """See :class:`TextFilter`."""
        return _NgramWatch(self._ngrams.watch())


class _NgramWatch:
    def __init__(self, check: LongTextCheck) -> None:
        self.reason: str | None = None
        self._check: Any = check

    @property
    def is_settled(self) -> bool:
        return self.reason is not None

    def add(self, piece: str) -> None:
        if self.reason is None and self._check.add(piece):
            self.reason = _CONTAMINATED

    def end(self) -> None:
        if self.reason is None and self._check.end():
            self.reason = _CONTAMINATED
