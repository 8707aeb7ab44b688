"""Markdown and HTML: a file is one document. Of Markdown the source, as it stands; of HTML the text that a page shows.

HTML goes through the standard library's parser: text needs no tree, so nothing heavier is worth its dependency, and
bytes are decoded here, strictly, where the libraries that build trees guess the charset or quietly stop at damage.
Leaves out styles (hidden elements), and finding the article among a page's menus: trafilatura and the like do that.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from html.parser import HTMLParser

from ..records import MalformedError, ReadContext, Record, Where
from ..tasks import Span
from . import text as text_files
from .streams import open_stream

_SKIPPED = frozenset(("script", "style", "template", "noscript", "iframe", "svg"))
_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|caption|center|d[dlt]|details|dialog|dir|div|fieldset|figcaption|figure|footer"
    "|form|h[1-6]|head|header|hgroup|hr|html|legend|li|main|menu|nav|ol|optgroup|option|p|pre|search|section|summary"
    "|table|tbody|tfoot|thead|title|tr|ul"
)
_SPACE = re.compile(r"[ \t\n\r\f]+")
_HEAD_BYTES = 4096
_CHARSET = re.compile(
    rb"<meta[^>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)|<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE
)
_BROWSERS_READ = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
"""What pages mean by these names: the larger charset (WHATWG, Encoding). Python's names."""
_CHARSETS = ("utf-8", "cp125", "iso8859", "koi8", "mac-", "gb", "big5", "euc", "iso2022", "cp932", "cp866", "cp874")


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The whole file as the only record of ``span``."""
    if span.file.format == "markdown":
        yield from text_files.read(span, context)
        return
    with open_stream(span.file, context) as stream:
        content = stream.read()
    where = Where(span.file.path)
    try:
        text = visible_text(decode_html(content))
    except MalformedError as error:
        context.refuse(where, str(error), error.kind, None)
        return
    yield Record(text, where)


def decode_html(content: bytes) -> str:
    """The characters of a page: by its byte order mark, else by the charset it names, else as UTF-8.

    Raises:
        MalformedError: it is not valid in that charset.
    """
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
    # UTF-16 cannot be what names itself in ASCII; others are no charsets of pages.
    return name if name.startswith(_CHARSETS) else "utf-8"


def visible_text(page: str) -> str:
    """The title, and what the body shows: blocks on lines of their own, a blank line around paragraphs, cells apart by
    tabs (like innerText of the HTML standard).

    Raises:
        MalformedError: an element without visible text, such as <script>, is never closed.
    """
    parser = _VisibleText()
    try:
        parser.feed(page)
        parser.close()
    except AssertionError as error:  # how the parser of older Pythons gives up
        raise MalformedError(f"no HTML: {error}") from None
    return parser.text()


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._breaks = 0
        """Line ends that come before the next text."""
        self._space = ""
        """White space that comes before the next text, if that is on the same line."""
        self._skipped = ""
        """The outermost element whose text does not count, and how often it is open."""
        self._skip_depth = 0
        self._preformatted = 0

    def text(self) -> str:
        """All of it."""
        if self._skip_depth:
            raise MalformedError(f"<{self._skipped}> is never closed")
        return "".join(self._parts)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _SKIPPED and not self._skip_depth:
            self._skipped = tag
        if self._skip_depth or tag in _SKIPPED:
            self._skip_depth += tag == self._skipped
        elif tag == "br":
            self._breaks += 1
        elif tag in ("td", "th"):
            self._space = "\t"
        else:
            self._break_before(tag)
            self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skip_depth:
            self._skip_depth -= tag == self._skipped
        else:
            self._break_before(tag)
            self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._skip_depth:
            return
        if self._preformatted:
            self._add(data)
            return
        words = _SPACE.sub(" ", data)
        if words != " ":
            if words[0] == " ":
                self._space = self._space or " "
            self._add(words.strip(" "))
        if words[-1] == " ":
            self._space = self._space or " "

    def _break_before(self, tag: str) -> None:
        if _BLOCKS.fullmatch(tag):
            self._breaks = max(self._breaks, 2 if tag == "p" else 1)

    def _add(self, text: str) -> None:
        if self._parts:
            self._parts.append("\n" * self._breaks or self._space)
        self._breaks, self._space = 0, ""
        self._parts.append(text)
