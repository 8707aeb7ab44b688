"""Normalizing a text that is too long to hold."""

from __future__ import annotations

import re
import unicodedata

_BOUNDARY = re.compile("[\x00-\x7f\u4e00-\u9fff]")
"""Some of the characters that compose with none before them: a text may be cut in front of one and its parts be
normalized each for itself (Unicode Standard Annex 15, section 9, "Normalization forms and stable code points")."""


class PieceNormalizer:
    """Brings a text to NFC that comes in pieces, cut anywhere: joined, what it returns is the normalized whole.

    It holds back what stands behind the last place where the text may be cut: some characters of any language, and all
    of what has no such place.
    """

    def __init__(self) -> None:
        self._held: list[str] = []

    def add(self, piece: str) -> str:
        """Take the next piece; return what is ready."""
        match = _BOUNDARY.search(piece[::-1])
        if match is None:
            self._held.append(piece)
            return ""
        cut = len(piece) - match.end()
        ready = unicodedata.normalize("NFC", "".join((*self._held, piece[:cut])))
        self._held = [piece[cut:]]
        return ready

    def end(self) -> str:
        """What is left at the end of the text."""
        return unicodedata.normalize("NFC", "".join(self._held))
