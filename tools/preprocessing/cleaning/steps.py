"""The steps that change a text. Each also works on a long text in pieces, cut anywhere, with the same result."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from ..options import PreprocessOptions
from .libraries import import_library
from .normalization import PieceNormalizer

_CONTROL_BYTES = bytes(code for code in (*range(0x20), 0x7F) if code not in b"\t\n\r")
"""In UTF-8: Unicode's category Cc (C0, DEL and C1) but for tab, line feed and carriage return; and those of C1."""
_C1 = re.compile(b"\xc2[\x80-\x9f]")
_FIXED_IN_ASCII = re.compile("[^\t\n\r -%'-~]")
"""ASCII characters that ftfy may change: control characters, and & of character references."""
_IN_URLS = "\\w!#$%&'*+,\\-./:;=?@~\\[\\]\u00c0-\u1fff"
_URL_CHARACTER = f"[{_IN_URLS}]"
_URL_END = "[\\w#$%&*+\\-/=@~\u00c0-\u1fff]"
_URL = re.compile(
    rf"(?<![A-Za-z0-9_])(?:(?:https?|ftp)://|www\.)(?:{_URL_CHARACTER}|\({_URL_CHARACTER}*\))*"
    rf"(?:{_URL_END}|\({_URL_CHARACTER}*\))",
    re.IGNORECASE | re.ASCII,
)
"""URLs. Letters of scripts with spaces belong to them, as browsers show them; those of Chinese and Japanese, which may
follow without a space, do not. Punctuation at the end belongs to the sentence, and so does an unpaired parenthesis."""
_NOT_IN_URLS = re.compile(f"[^{_IN_URLS}()]", re.ASCII)
_UNUSUAL_SPACE = re.compile(r"\s{2,}|[^\S \n]")
"""All runs of white space but a single space or line feed."""


class TextStep(Protocol):
    """A step that changes a text."""

    name: str
    """The option, under which changed texts are counted."""

    def whole(self, text: str) -> str:
        """Return the changed text; the same object if nothing is to do is fastest."""

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the changed text of ``pieces``, in other pieces."""


def text_steps(options: PreprocessOptions) -> list[TextStep]:
    """Return the steps that ``options`` ask for, in their order."""
    steps: list[TextStep] = []
    if options.fix_text:
        steps.append(FixText())
    if options.strip_control:
        steps.append(StripControl())
    # After the control characters, because one may separate a letter and its accent.
    if options.normalize == "nfc":
        steps.append(NormalizeNfc())
    if options.remove_urls:
        steps.append(RemoveUrls())
    # The last one, because the others may leave white space behind.
    if options.collapse_whitespace:
        steps.append(CollapseWhitespace())
    return steps


class FixText:
    """Repairs text that was decoded with the wrong encoding, such as "schÃ¶n", with ftfy.

    The settings are those of datatrove's FTFYFormatter: they repair encodings, character references such as ``&amp;``
    in text without tags, terminal escapes and control characters. Quotation marks, ligatures, full-width forms and line
    ends stay as they are.
    """

    name = "--fix-text"

    def __init__(self) -> None:
        self._ftfy: Any = import_library("ftfy", self.name)
        self._config = self._ftfy.TextFixerConfig(
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            fix_line_breaks=False,
            normalization=None,
            explain=False,
        )

    def whole(self, text: str) -> str:
        """See :class:`TextStep`."""
        if text.isascii() and not _FIXED_IN_ASCII.search(text):
            return text
        return self._ftfy.fix_text(text, self._config)

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """See :class:`TextStep`."""
        config = self._config
        for block in _blocks_of_lines(pieces, config.max_decode_length):
            yield self._ftfy.fix_text(block, config)
            if "<" in block and config.unescape_html == "auto":
                config = config._replace(unescape_html=False)  # from the first tag on, as ftfy does


def _blocks_of_lines(pieces: Iterable[str], longest: int) -> Iterator[str]:
    """Yield whole lines, of which ftfy changes each by itself; of longer lines parts of ``longest``, as ftfy does."""
    held = ""
    for piece in pieces:
        held += piece
        while cut := held.rfind("\n") + 1 or (longest if len(held) > longest else 0):
            yield held[:cut]
            held = held[cut:]
    yield held


class StripControl:
    """Removes category Cc except tab, line feed and carriage return.

    Nothing replaces them, because a line feed usually accompanies form feed and next line (U+0085).
    """

    name = "--strip-control"

    def whole(self, text: str) -> str:
        """See :class:`TextStep`."""
        return strip_control(text)

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """See :class:`TextStep`."""
        return map(strip_control, pieces)


def strip_control(text: str) -> str:
    """Remove control characters; return the same object if there are none."""
    # Searching bytes is several times as fast as characters.
    content = text.encode("utf-8", "surrogatepass")
    cleaned = _C1.sub(b"", content.translate(None, _CONTROL_BYTES))
    return text if len(cleaned) == len(content) else cleaned.decode("utf-8", "surrogatepass")


class NormalizeNfc:
    """Converts to Unicode's normalization form C."""

    name = "--normalize nfc"

    def whole(self, text: str) -> str:
        """See :class:`TextStep`."""
        # Fast, and returns the same object, if there is nothing to do.
        return unicodedata.normalize("NFC", text)

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """See :class:`TextStep`."""
        normalizer = PieceNormalizer()
        for piece in pieces:
            yield normalizer.add(piece)
        yield normalizer.end()


class RemoveUrls:
    """Removes URLs that begin with http://, https://, ftp:// or www. and leaves what surrounds them."""

    name = "--remove-urls"

    def whole(self, text: str) -> str:
        """See :class:`TextStep`."""
        return _URL.sub("", text)

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """See :class:`TextStep`. What follows the last character that no URL contains is held."""
        held = ""
        for piece in pieces:
            held += piece
            match = _NOT_IN_URLS.search(held[::-1])
            cut = len(held) - match.start() if match else 0
            yield self.whole(held[:cut])
            held = held[cut:]
        yield self.whole(held)


class CollapseWhitespace:
    """Replaces each run of white space by one space, or one line feed if it has a line end, or two if it has more.

    Paragraphs and lines remain; indentation, trailing spaces and white space around the text do not. Line ends are
    those of ``str.splitlines``.
    """

    name = "--collapse-whitespace"

    def whole(self, text: str) -> str:
        """See :class:`TextStep`."""
        return _UNUSUAL_SPACE.sub(_collapsed, text.strip())

    def pieces(self, pieces: Iterable[str]) -> Iterator[str]:
        """See :class:`TextStep`. A run of white space at the end of a piece may continue in the next one."""
        held, is_start = "", True
        for piece in pieces:
            text = held + piece
            text = text.lstrip() if is_start else text
            is_start = is_start and not text
            end = len(text.rstrip())
            yield _UNUSUAL_SPACE.sub(_collapsed, text[:end])
            held = text[end:]


def _collapsed(match: re.Match[str]) -> str:
    num_line_ends = len(f"{match[0]}.".splitlines()) - 1
    return "\n" * min(num_line_ends, 2) or " "
