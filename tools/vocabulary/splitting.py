"""Split text into words: with the tokenizer's rules, or as sentencepiece does in training if these split nothing.

A sentencepiece model joins characters wherever its pieces say so, and its tokenizer.json may not split text at all. But
in training, words begin at spaces, hold letters of one script, and with ``split_digits`` one digit. New pieces must
follow these rules, since others would join where no piece of the model does.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers

from .vocabulary import WORD_START

_CHUNK = re.compile(f"{WORD_START}+[^{WORD_START}]*|[^{WORD_START}]+")
_REMEMBERED = 1 << 18


def split_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return ``text``, normalized and split by the tokenizer's own rules."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


class WordSplitter:
    """Splits normalized text, in which spaces are U+2581.

    Args:
        pieces: of the vocabulary. If none holds two digits, digits are separate words.
    """

    def __init__(self, pieces: Iterable[str]):
        self._digits_apart = not any(_num_digits(piece) > 1 for piece in pieces)
        steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.UnicodeScripts()]
        if self._digits_apart:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        self._cut = pre_tokenizers.Sequence(steps)
        self._parts = functools.lru_cache(_REMEMBERED)(self._parts_of)

    def __call__(self, text: str) -> list[str]:
        """Return the words of ``text``; their concatenation is ``text``."""
        return [part for chunk in _CHUNK.findall(text) for part in self._parts(chunk)]

    def _parts_of(self, chunk: str) -> list[str]:
        """Split spaces and the text after them up to the next space."""
        rest = chunk.lstrip(WORD_START)
        spaces = chunk[: len(chunk) - len(rest)]
        parts = [part for part, _ in self._cut.pre_tokenize_str(rest)] if rest else []
        if "".join(parts) != rest:  # the library drops characters without a script
            parts = [rest]
        if not parts or (self._digits_apart and unicodedata.category(parts[0][0]) == "Nd"):
            return [spaces, *parts] if spaces else parts
        return [spaces + parts[0], *parts[1:]]


def may_be_piece(text: str, max_characters: int) -> bool:
    """Return whether sentencepiece's trainer would accept ``text`` as a piece: U+2581 only at its beginning, and not
    long.
    """
    rest = text[1:] if text.startswith(WORD_START) else text
    return bool(rest) and WORD_START not in rest and len(text) <= max_characters


def _num_digits(piece: str) -> int:
    return 0 if piece.startswith("<0x") else sum(unicodedata.category(character) == "Nd" for character in piece)
