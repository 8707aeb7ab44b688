"""Cleans the text of documents before tokenization, and decides which documents are left out by their text.

It runs in the workers over the whole corpus; disabled steps cost nothing. Duplicates are found later (dedup/).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..options import PreprocessOptions
from .decontamination import NgramFilter
from .normalization import PieceNormalizer

_CONTROL_BYTES = bytes(code for code in (*range(0x20), 0x7F) if code not in b"\t\n\r")
"""In UTF-8: Unicode's category Cc (C0, DEL and C1) but for tab, line feed and carriage return; and those of C1."""
_C1 = re.compile(b"\xc2[\x80-\x9f]")

_SHORT, _CONTAMINATED = "below --min-chars", "shares an n-gram with --held-out"


class Cleaner:
    """Cleans texts, and returns the reason to leave a text out.

    The order: remove control characters; normalize (afterwards, because a control character may separate a letter and
    its accent); check the length; check the n-grams.

    Args:
        options: ``normalize`` "nfc": convert texts to Unicode's normalization form C. ``strip_control``: remove
            category Cc except tab, line feed and carriage return. Nothing replaces them, because a line feed usually
            accompanies form feed and next line (U+0085). ``min_chars``: leave out texts with fewer code points.
        held_out: file of a :class:`NgramFilter`: leave out texts that share an n-gram with it.
    """

    def __init__(self, options: PreprocessOptions, held_out: Path | None = None) -> None:
        self._normalize_nfc = options.normalize == "nfc"
        self._strip_control = options.strip_control
        self._min_chars = options.min_chars
        self._filter = None if held_out is None else NgramFilter.load(held_out)

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self._normalize_nfc or self._strip_control or self._min_chars > 0 or self._filter is not None

    def clean(self, text: str) -> tuple[str, str | None]:
        """Return the cleaned text, and the reason to leave it out or None. :meth:`clean_batch` is faster."""
        return self.clean_batch([text])[0]

    def clean_batch(self, texts: Sequence[str]) -> list[tuple[str, str | None]]:
        """Return for each text the cleaned text, and the reason to leave it out or None."""
        cleaned = [self._cleaned(text) for text in texts] if self._normalize_nfc or self._strip_control else texts
        reasons: list[str | None] = [None] * len(cleaned)
        if self._filter is not None:
            found = self._filter.contaminated_batch(cleaned).tolist()
            reasons = [_CONTAMINATED if hit else None for hit in found]
        if self._min_chars > 0:
            reasons = [
                _SHORT if len(text) < self._min_chars else reason for text, reason in zip(cleaned, reasons, strict=True)
            ]
        return list(zip(cleaned, reasons, strict=True))

    def clean_pieces(self, pieces: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """Clean one long text that comes in pieces, cut anywhere, in memory of a few pieces.

        The joined pieces are the cleaned text, and n-grams across cuts are checked. The iteration ends at a reason.
        """
        size = 0
        watch = None if self._filter is None else self._filter.watch()
        found = False
        for piece in self._cleaned_pieces(pieces):
            size += len(piece)
            found = found or (watch is not None and watch.add(piece))
            # A text that is too short and contaminated counts as too short.
            if found and size >= self._min_chars:
                yield piece, _CONTAMINATED
                return
            yield piece, None
        if size < self._min_chars:
            yield "", _SHORT
        elif watch is not None and watch.end():
            yield "", _CONTAMINATED

    def _cleaned(self, text: str) -> str:
        if self._strip_control:
            text = strip_control(text)
        # Fast, and returns the same object, if there is nothing to do.
        return unicodedata.normalize("NFC", text) if self._normalize_nfc else text

    def _cleaned_pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        if self._strip_control:
            pieces = map(strip_control, pieces)
        if not self._normalize_nfc:
            yield from pieces
            return
        normalizer = PieceNormalizer()
        for piece in pieces:
            yield normalizer.add(piece)
        yield normalizer.end()


def strip_control(text: str) -> str:
    """Remove control characters; return the same object if there are none."""
    # Searching bytes is several times as fast as characters.
    content = text.encode("utf-8", "surrogatepass")
    cleaned = _C1.sub(b"", content.translate(None, _CONTROL_BYTES))
    return text if len(cleaned) == len(content) else cleaned.decode("utf-8", "surrogatepass")
