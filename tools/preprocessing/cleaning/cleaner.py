"""What is done to a document's text before it is tokenized, and for which texts a document is refused.

Runs in the workers, over every character of the corpus: what is switched off costs nothing. Which documents other
documents make superfluous is decided later, by exact_dedup.py and near_dedup.py.
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
    """Cleans texts, and says for what reason a text is no document after all.

    The order is: control characters are removed; what is left is normalized, so that the result is in NFC though a
    control character stood between a letter and its accent; its length is looked at; then its n-grams.

    Args:
        options: ``normalize`` "nfc": bring texts to Unicode's normalization form C. ``strip_control``: remove control
            characters: category Cc but for tab, line feed and carriage return. Nothing takes their place, not even of a
            form feed or next line (U+0085), beside which there usually is a line feed. ``min_chars``: refuse texts with
            fewer characters (Unicode code points, whitespace too) when cleaned.
        held_out: file of a :class:`NgramFilter`: refuse texts that share an n-gram with it.
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
        """The cleaned text, and the reason to leave it out or None. A batch costs less: :meth:`clean_batch`."""
        return self.clean_batch([text])[0]

    def clean_batch(self, texts: Sequence[str]) -> list[tuple[str, str | None]]:
        """For each of ``texts`` the cleaned text, and the reason to leave it out or None."""
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
        """The same for one long text that comes in pieces, cut anywhere; memory is bounded by some pieces.

        Joined, the cleaned pieces are the cleaned whole, and n-grams across a cut are seen. A reason is given as soon
        as it is known, with the last piece that matters; nothing comes after it.
        """
        size = 0
        watch = None if self._filter is None else self._filter.watch()
        found = False
        for piece in self._cleaned_pieces(pieces):
            size += len(piece)
            found = found or (watch is not None and watch.add(piece))
            # A text that is both too short and contaminated is too short.
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
        # Returns the same object, and quickly, when there is nothing to be done.
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
    """``text`` without the control characters that :class:`Cleaner` names; the same object when it has none."""
    # Bytes are searched several times as fast as characters.
    content = text.encode("utf-8", "surrogatepass")
    cleaned = _C1.sub(b"", content.translate(None, _CONTROL_BYTES))
    return text if len(cleaned) == len(content) else cleaned.decode("utf-8", "surrogatepass")
