"""Markdown and HTML: a file is one document, the source of Markdown or the text that an HTML page shows.

lxml parses HTML without building a tree. This module decodes the bytes first (strictly, because parsers guess the
charset and continue after damage) and lays out the text. Not supported: styles (hidden elements), the break of a </p>
without <p>, which libxml2 drops, and extracting the article from a page with menus, as trafilatura does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from ....engine.errors import UserError
from ..formats import require_library
from ..readers import text as text_files
from ..records.errors import MalformedError, Where
from ..records.reading import ReadContext, Record
from ..workers.tasks import Span
from .streams import open_stream

_MAX_BYTES = 1 << 26
_SKIPPED = frozenset(("script", "style", "template", "noscript", "iframe", "svg"))
_BLOCK_NAMES = (
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li main menu nav ol optgroup option p pre search "
    "section summary table tbody tfoot thead title tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_SPACE = re.compile(r"[ \t\n\r\f]+")
_LIBXML = (2, 14)
"""The first version that splits a page into tags and text as the HTML standard defines."""
_PIECE = 1 << 18
_MAX_DEPTH = 5_000
"""Of nested elements, checked after a piece: at an unmatched end tag libxml2 searches all open elements."""
_END = "end-of-this-page"
"""An element added after the page: if it does not arrive, something in the page was not closed."""
_HEAD_BYTES = 4096
_CHARSET = re.compile(
    rb"<meta[^>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)|<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE
)
_BROWSERS_READ = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
"""What pages mean by these names: the larger charset (WHATWG, Encoding). Python's names."""
_CHARSETS = ("utf-8", "cp125", "iso8859", "koi8", "mac-", "gb", "big5", "euc", "iso2022", "cp932", "cp866", "cp874")


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the file as one record."""
    if span.file.format == "markdown":
        yield from text_files.read(span, context)
        return
    with open_stream(span.file, context) as stream:
        content = stream.read(_MAX_BYTES + 1)
        context.consumed = span.file.size
    where = Where(span.file.path)
    try:
        if len(content) > _MAX_BYTES:
            raise MalformedError(f"an HTML page of more than {_MAX_BYTES >> 20} MB; split it")
        text = visible_text(decode_html(content), span.file.path)
    except MalformedError as error:
        context.refuse(where, str(error), error.kind, None)
        return
    yield Record(text, where)


def decode_html(content: bytes) -> str:
    """Decode a page by its byte order mark, the charset it names, or as UTF-8. Raise MalformedError if invalid."""
    charset = "utf-8"
    if content.startswith(codecs.BOM_UTF8):
        content = content.removeprefix(codecs.BOM_UTF8)
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        charset = "utf-16"
    elif named := _CHARSET.search(content[:_HEAD_BYTES]):
        charset = _python_name((named[1] or named[2]).decode("ascii"))
    try:
        return content.decode(charset)
    except UnicodeDecodeError as error:
        kind = "invalid UTF-8" if charset == "utf-8" else "malformed"
        found = f"byte 0x{content[error.start]:02x} at byte {error.start + 1} of the file"
        raise MalformedError(f"not valid {charset.upper()}: {found}", kind) from None


def _python_name(charset: str) -> str:
    try:
        name = codecs.lookup(charset).name
    except LookupError:
        return "utf-8"
    name = _BROWSERS_READ.get(name, name)
    # A page that names its charset in ASCII is not UTF-16; other codecs are not charsets of pages.
    return name if name.startswith(_CHARSETS) else "utf-8"


def visible_text(page: str, path: str) -> str:
    """Return the title and the visible text: blocks on their own lines, blank lines around paragraphs, tabs between
    cells (like innerText of the HTML standard).

    Raises:
        MalformedError: a tag, a comment, or an element such as <script> is not closed, or too many elements are open.
        UserError: lxml is not installed, or uses an old libxml2; ``path`` is for the message.
    """
    etree = require_library("lxml.etree", path)
    if etree.LIBXML_VERSION < _LIBXML:
        raise UserError(
            f"{path}: reading it needs libxml2 {_LIBXML[0]}.{_LIBXML[1]} or newer, and this lxml has another: "
            "pip install --force-reinstall --only-binary lxml 'lxml>=6.0'"
        )
    shown = _VisibleText()
    parser = etree.HTMLParser(target=shown, encoding="utf-8", huge_tree=True)
    source = f"{page}<{_END}>"
    for start in range(0, len(source), _PIECE):
        parser.feed(source[start : start + _PIECE].encode())
        if shown.depth > _MAX_DEPTH:
            raise MalformedError(f"{shown.depth} elements are open, one in another; at most {_MAX_DEPTH} may be")
    return parser.close()


class _VisibleText:
    """Lays out the text and tags that lxml reports."""

    def __init__(self) -> None:
        self.depth = 0
        """Number of open elements."""
        self._parts: list[str] = []
        self._breaks = 0
        """Line ends before the next text."""
        self._space = ""
        """White space before the next text on the same line."""
        self._skipped = ""
        """The outermost skipped element, and how often it is open."""
        self._skip_depth = 0
        self._preformatted = 0
        self._whole = False
        """Whether the page's end was reached outside of skipped elements."""

    def close(self) -> str:
        """Return the text."""
        if not self._whole:
            raise MalformedError("a tag, a comment or an element such as <script> is never closed: truncated?")
        return "".join(self._parts)

    def start(self, tag: str, _attributes: object) -> None:
        """Handle the begin of an element."""
        self.depth += 1
        if tag in _SKIPPED and not self._skip_depth:
            self._skipped = tag
        if self._skip_depth or tag in _SKIPPED:
            self._skip_depth += tag == self._skipped
        elif tag == "br":
            self._breaks += 1
        elif tag in ("td", "th"):
            self._space = "\t"
        elif tag == _END:
            self._whole = True
        else:
            self._break_before(tag)
            self._preformatted += tag == "pre"

    def end(self, tag: str) -> None:
        """Handle the end of an element."""
        self.depth -= 1
        if self._skip_depth:
            self._skip_depth -= tag == self._skipped
        else:
            self._break_before(tag)
            self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def data(self, text: str) -> None:
        """Text between tags, possibly a part of it."""
        if self._skip_depth:
            return
        if self._preformatted:
            self._add(text)
            return
        words = _SPACE.sub(" ", text)
        if not words:
            return
        if words != " ":
            if words[0] == " ":
                self._space = self._space or " "
            self._add(words.strip(" "))
        if words[-1] == " ":
            self._space = self._space or " "

    def _break_before(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._breaks = max(self._breaks, 2 if tag == "p" else 1)

    def _add(self, text: str) -> None:
        if self._parts:
            self._parts.append("\n" * self._breaks or self._space)
        self._breaks, self._space = 0, ""
        self._parts.append(text)
