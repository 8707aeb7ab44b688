"""Markdown and HTML: a file is one document. Of Markdown the source, as it stands; of HTML the text that a page shows.

HTML is cut into tags and text here, as the HTML standard says (chapter 13.2.5), in one pass: text needs no tree; and
the standard library's parser takes hours for a damaged page of some hundred kB, and reads others differently from
one Python to the next. Bytes are decoded strictly, where other libraries guess the charset or quietly stop at damage.
Leaves out styles (hidden elements), and finding the article among a page's menus: trafilatura and the like do that.
"""

from __future__ import annotations

import codecs
import html
import re
from collections.abc import Iterator

from ..records import MalformedError, ReadContext, Record, Where
from ..tasks import Span
from . import text as text_files
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
_MARKUP = re.compile(r"<(?:(?P<slash>/?)(?P<name>[A-Za-z][^ \t\n\r\f/>]*)|!--|[!?]|/(?!\Z))")
_BETWEEN = re.compile(r"[ \t\n\r\f/]*")
_ATTRIBUTE = re.compile(r"[^ \t\n\r\f/>][^ \t\n\r\f/>=]*(?P<equals>[ \t\n\r\f]*=[ \t\n\r\f]*)?")
_UNQUOTED = re.compile(r"[^ \t\n\r\f>]*")
_COMMENT_END = re.compile("--!?>")
_RAW = {
    tag: re.compile(rf"</{tag}(?=[ \t\n\r\f/>])", re.IGNORECASE)
    for tag in ("script", "style", "iframe", "title", "textarea")
}
"""Elements in which tags are text, and what ends them."""
_SHOWN = 20
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
        content = stream.read(_MAX_BYTES + 1)
        context.consumed = span.file.size
    where = Where(span.file.path)
    try:
        if len(content) > _MAX_BYTES:
            raise MalformedError(f"an HTML page of more than {_MAX_BYTES >> 20} MB; split it")
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
        MalformedError: a tag, a comment, or an element without visible text, such as <script>, has no end.
    """
    shown = _VisibleText()
    position = 0
    while position < len(page):
        opening = _MARKUP.search(page, position)
        stop = opening.start() if opening else len(page)
        if stop > position:
            shown.add_text(page[position:stop])
        if opening is None:
            break
        position = _after_markup(page, opening, shown)
    return shown.end()


def _after_markup(page: str, opening: re.Match[str], shown: _VisibleText) -> int:
    """Take what begins with ``opening``; the position behind it."""
    if opening["name"] is None:
        end = _comment_end(page, opening)
        if end < 0:
            raise MalformedError(f"{opening[0]} is never closed: truncated?")
        return end
    tag = opening["name"].lower()
    end, closes_itself = _tag_end(page, opening.end())
    if end < 0:
        raise MalformedError(f"the tag {opening[0][:_SHOWN]!r} is never closed: truncated?")
    if opening["slash"]:
        shown.end_tag(tag)
        return end
    shown.start_tag(tag)
    if closes_itself and (tag in _SKIPPED or tag in _RAW):
        shown.end_tag(tag)
    elif tag in _RAW:
        found = _RAW[tag].search(page, end)
        if found is None:
            raise MalformedError(f"<{tag}> is never closed: truncated?")
        if tag not in _SKIPPED:
            shown.add_text(page[end : found.start()])
        return found.start()
    return end


def _comment_end(page: str, opening: re.Match[str]) -> int:
    """Behind a comment, or what the standard takes for one; -1: it does not end."""
    start = opening.end()
    if opening[0] != "<!--":
        return page.find(">", start) + 1 or -1
    if page.startswith((">", "->"), start):
        return page.index(">", start) + 1
    found = _COMMENT_END.search(page, start)
    return found.end() if found else -1


def _tag_end(page: str, position: int) -> tuple[int, bool]:
    """Behind the tag whose name ends at ``position``, and whether a slash ends it; -1: it does not end."""
    if page.startswith(">", position):
        return position + 1, False
    while True:
        between = _BETWEEN.match(page, position)
        assert between is not None
        position = between.end()
        if page.startswith(">", position):
            return position + 1, between[0].endswith("/")
        attribute = _ATTRIBUTE.match(page, position)
        if attribute is None:
            return -1, False
        position = attribute.end()
        if attribute["equals"] is None:
            continue
        if page.startswith(('"', "'"), position):
            position = page.find(page[position], position + 1) + 1
            if position == 0:
                return -1, False
        else:
            value = _UNQUOTED.match(page, position)
            assert value is not None
            position = value.end()


class _VisibleText:
    """Lays out text and tags as they come."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._breaks = 0
        """Line ends that come before the next text."""
        self._space = ""
        """White space that comes before the next text, if that is on the same line."""
        self._skipped = ""
        """The outermost element whose text does not count, and how often it is open."""
        self._skip_depth = 0
        self._preformatted = 0

    def end(self) -> str:
        """All of it."""
        if self._skip_depth:
            raise MalformedError(f"<{self._skipped}> is never closed: truncated?")
        return "".join(self._parts)

    def start_tag(self, tag: str) -> None:
        """An element begins."""
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

    def end_tag(self, tag: str) -> None:
        """An element ends."""
        if self._skip_depth:
            self._skip_depth -= tag == self._skipped
        else:
            self._break_before(tag)
            self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def add_text(self, source: str) -> None:
        """Text between tags, with character references."""
        if self._skip_depth:
            return
        text = _unescaped(source)
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


def _unescaped(source: str) -> str:
    if "&" not in source:
        return source
    try:
        return html.unescape(source)
    except ValueError:  # Python reads no number of thousands of digits
        raise MalformedError("a character reference of thousands of digits") from None
