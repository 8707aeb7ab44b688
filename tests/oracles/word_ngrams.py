"""What n-grams are, as slow and obvious as can be: by the characters' names and categories, in tuples of strings."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

HALF = (
    "CJK ",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "COMBINING KATAKANA",
    "HENTAIGANA",
    "BOPOMOFO",
    "HANGZHOU",
)
HALF += ("IDEOGRAPHIC ITERATION", "IDEOGRAPHIC CLOSING", "IDEOGRAPHIC NUMBER")
QUARTER = ("THAI ", "LAO ", "MYANMAR ", "KHMER ", "TAI LE", "NEW TAI LUE", "TAI THAM", "TAI VIET", "JAVANESE")


def kind_of(character: str) -> str:
    """ "word", "half", "quarter" (what a word is made of, or as much as one), "separator" or "ignored"."""
    name = unicodedata.name(character, "")
    category = unicodedata.category(character)
    if category == "Cf" or name.startswith("VARIATION SELECTOR"):
        return "ignored"
    if category[0] not in "LMN":
        return "separator"
    if name.startswith(HALF):
        return "half"
    if name.startswith(QUARTER):
        return "quarter"
    return "word"


def words_of(text: str) -> list[tuple[str, float]]:
    """The words of a text, and how many words each counts."""
    words: list[tuple[str, float]] = []
    word = ""
    for character in unicodedata.normalize("NFC", text).casefold() + " ":
        kind = kind_of(character)
        if kind == "word":
            word += character
        elif kind != "ignored":
            if word:
                words.append((word, 1.0))
            word = ""
            if kind != "separator":
                words.append((character, 0.5 if kind == "half" else 0.25))
    return words


def ngrams_of(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """From each word on as many as count n words."""
    words = words_of(text)
    for first in range(len(words)):
        count = 0.0
        for last in range(first, len(words)):
            count += words[last][1]
            if count >= n:
                yield tuple(word for word, _ in words[first : last + 1])
                break


def shingles_of(text: str, n: int) -> set[tuple[str, ...]]:
    """All n-grams; of a shorter text all of it."""
    found = set(ngrams_of(text, n))
    whole = tuple(word for word, _ in words_of(text))
    return found or ({whole} if whole else set())


def shares_ngram(text: str, held_out: list[str], n: int, least: int = 8) -> bool:
    """Whether ``text`` shares an n-gram with a held-out text, holds one of ``least`` to n - 1 words, or is a shorter
    one, word by word."""
    words = [word for word, _ in words_of(text)]
    here = set(ngrams_of(text, n))
    for other in held_out:
        grams = set(ngrams_of(other, n))
        if here & grams:
            return True
        if grams or not words_of(other):
            continue
        whole = [word for word, _ in words_of(other)]
        if whole == words:
            return True
        if sum(count for _, count in words_of(other)) >= least:
            size = len(whole)
            if any(words[i : i + size] == whole for i in range(len(words) - size + 1)):
                return True
    return False
