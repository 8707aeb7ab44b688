"""Words as sentencepiece cuts them in training, for tokenizers whose own rules cut nothing.

A sentencepiece model joins characters wherever its pieces say so, and its tokenizer.json may cut nothing at all. But in
training words begin at spaces, hold letters of one script, and with ``split_digits`` one digit. New pieces keep to
that, since others would join where no piece of the model does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from tokenizers import Regex, pre_tokenizers

from .vocabulary import WORD_START


class WordSplitter:
    """Cuts normalized text, spaces of which are U+2581.

    Args:
        pieces: of the vocabulary. Where none holds two digits, digits stand alone.
    """

    def __init__(self, pieces: Iterable[str]):
        self._digits_apart = not any(_num_digits(piece) > 1 for piece in pieces)
        steps = [pre_tokenizers.Split(Regex(" +[^ ]*"), "isolated"), pre_tokenizers.UnicodeScripts()]
        if self._digits_apart:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        self._cut = pre_tokenizers.Sequence(steps)

    def __call__(self, text: str) -> list[str]:
        """The words of ``text``."""
        # To the library a space belongs to every script, and U+2581 to none.
        parts = self._cut.pre_tokenize_str(text.replace(WORD_START, " "))
        return [part.replace(" ", WORD_START) for part, _ in parts]


def may_be_piece(text: str, max_characters: int) -> bool:
    """Whether sentencepiece's trainer would take ``text`` for a piece: U+2581 only at its beginning, and not long."""
    rest = text[1:] if text.startswith(WORD_START) else text
    return bool(rest) and WORD_START not in rest and len(text) <= max_characters


def _num_digits(piece: str) -> int:
    return 0 if piece.startswith("<0x") else sum(unicodedata.category(character) == "Nd" for character in piece)
