"""Unicode normalization of a text that comes in pieces."""

from __future__ import annotations

import re
import unicodedata

_BOUNDARY = re.compile("[\x00-\x7f\u4e00-\u9fff]")
"""Some of the characters that never compose with one before them: a text may be cut before one, and its parts may be
normalized separately (Unicode Standard Annex 15, section 9, "Normalization forms and stable code points")."""


class PieceNormalizer:
    """Converts a text in pieces, cut anywhere, to NFC: the joined results are the normalized text.

    It holds the text after the last possible cut: usually some characters, and all of a text without such a place.
    """

    def __init__(self) -> None:
        self._held: list[str] = []

    def add(self, piece: str) -> str:
        """Add the next piece; return what is ready."""
        match = _BOUNDARY.search(piece[::-1])
        if match is None:
            self._held.append(piece)
            return ""
        cut = len(piece) - match.end()
        ready = unicodedata.normalize("NFC", "".join((*self._held, piece[:cut])))
        self._held = [piece[cut:]]
        return ready

    def end(self) -> str:
        """Return the rest of the text."""
        return unicodedata.normalize("NFC", "".join(self._held))
