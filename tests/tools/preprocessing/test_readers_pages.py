"""Readers of PDF and HTML: what the pages show, and what is wrong with files that show nothing."""

from __future__ import annotations

import gzip
import io
import random
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from oracles.reading import read_file
from oracles.tiny_pdf import tiny_pdf

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.readers import markup
from retemper.tools.preprocessing.readers.markup import decode_html, visible_text
from retemper.tools.preprocessing.records.errors import MalformedError

PAGES = [["The first line,", "a (second) line \\ of it."], [], ["On page three."]]


@pytest.fixture
def pypdf():
    return pytest.importorskip("pypdf", reason="needs pypdf: pip install 'pypdf[crypto]'")


# ---------------------------------------------------------------------------------------------------------------
# PDF


@pytest.mark.parametrize("compressed", [False, True])
def test_a_pdf_is_the_lines_that_its_pages_draw(tmp_path, pypdf, compressed):
    path = tmp_path / "a.pdf"
    path.write_bytes(tiny_pdf(PAGES, compressed))
    reading = read_file(path)
    assert reading.values == ["The first line,\na (second) line \\ of it.\n\nOn page three."]
    assert (reading.places, reading.refused) == (["a.pdf"], [])


def test_pages_with_text_are_documents_on_request(tmp_path, pypdf):
    path = tmp_path / "a.pdf"
    path.write_bytes(tiny_pdf(PAGES))
    reading = read_file(path, pdf_pages=True)
    assert reading.values == ["The first line,\na (second) line \\ of it.", "On page three."]
    assert (reading.places, reading.refused) == (["a.pdf: page 1", "a.pdf: page 3"], [])
    path.write_bytes(tiny_pdf([[], []]))
    assert read_file(path, pdf_pages=True).refused == ["a.pdf: no text: a scan? run OCR first [malformed]"]


def encrypted(pypdf: object, user_password: str, algorithm: str) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(tiny_pdf(PAGES)))  # type: ignore[attr-defined]
    writer.encrypt(user_password=user_password, owner_password="owner", algorithm=algorithm)
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def test_an_encrypted_pdf_is_read_only_without_a_password(tmp_path, pypdf):
    pytest.importorskip("cryptography", reason="needs cryptography: pip install 'pypdf[crypto]'")
    path = tmp_path / "a.pdf"
    for algorithm in ("RC4-128", "AES-256"):
        path.write_bytes(encrypted(pypdf, "secret", algorithm))
        reading = read_file(path)
        assert reading.values == []
        assert reading.refused == ["a.pdf: locked with a password; save it without one [malformed]"]
        path.write_bytes(encrypted(pypdf, "", algorithm))
        assert read_file(path).values[0].startswith("The first line,")


def test_a_pdf_without_text_is_refused(tmp_path, pypdf):
    path = tmp_path / "a.pdf"
    for pages in ([], [[]], [[" "], []]):
        path.write_bytes(tiny_pdf(pages))
        assert read_file(path).refused == ["a.pdf: no text: a scan? run OCR first [malformed]"]


def test_what_is_no_pdf_is_refused(tmp_path, pypdf):
    content = tiny_pdf(PAGES, compressed=True)
    path = tmp_path / "a.pdf"
    for bad in (b"", b"text\n", b"%PDF-1.4\n", content[:100], content[20:], b"%PDF-1.4\n" + b"\0" * 5000):
        path.write_bytes(bad)
        reading = read_file(path)
        assert reading.values == []
        assert len(reading.refused) == 1 and "\n" not in reading.refused[0]
        assert reading.refused[0].startswith(("a.pdf: truncated, damaged or not a PDF", "a.pdf: no text"))


def test_a_page_that_cannot_be_read_is_named(tmp_path, pypdf, monkeypatch):
    def fail(self: object) -> str:
        raise KeyError("/Font")

    path = tmp_path / "a.pdf"
    path.write_bytes(tiny_pdf(PAGES))
    monkeypatch.setattr(pypdf.PageObject, "extract_text", fail)
    assert read_file(path).refused == ["a.pdf: page 1: truncated, damaged or not a PDF ('/Font') [malformed]"]
    for text, reason in (("a\ud800", "half a character"), (" ", "no text")):
        monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda self, text=text: text)
        assert reason in read_file(path).refused[0]


# ---------------------------------------------------------------------------------------------------------------
# HTML


@pytest.fixture
def lxml():
    return pytest.importorskip("lxml.etree", reason="needs lxml: pip install lxml")


SHOWN = {
    "<p>one</p><p>two</p>": "one\n\ntwo",
    "one<br>two<BR/>three": "one\ntwo\nthree",
    "<title>A &amp; B</title><body> <h1>Head</h1>\n\n text <b>bold</b>, and <i> more</i> </body>": (
        "A & B\nHead\ntext bold, and more"
    ),
    "<table><tr><td>1</td><td>2</td></tr><tr><td>3<td>4</table>": "1\t2\n3\t4",
    "<pre>  a\n\n b</pre> <p> c  d\n e": "  a\n\n b\n\nc d e",
    "a<script>if (a<b) '</p>'</script>b<style>p>a{}</style>c<!-- <p>no</p> -->d": "abcd",
    "<svg><title>no</title><svg/></svg>a<template><template></template>no</template>b": "ab",
    "<a title='a > b' href=\"x\">link</a><img alt='<p>'>": "link",
    "5 < 6 && 7 > 3 </ x> &lt;p&gt; &#x41;&copy &nosuch;": "5 < 6 && 7 > 3 <p> A© &nosuch;",
    "<p>&#1;</p>&#xD800;&#0;&#x80;&#" + "9" * 5000 + ";": "\x01\n\n��€�",
    "<!DOCTYPE html><html><head><meta charset=utf-8></head><body>x</body></html>": "x",
    "<?xml version='1.0'?>a<![CDATA[b]]>c": "ac",
    "<textarea><p>&lt;</textarea><title></title>": "<p><",
    "<script/>a<title/>b<iframe src=x />c": "a\nbc",
    "<!-->a<!--->b<!--!> --!>c": "abc",
    "a\0b<\0c><script>\0</script>\0": "a�b<�c>�",
    "a</body>b</html>c<p>d": "a\nb\nc\n\nd",
    "<frameset><frame></frameset><noframes>a</noframes>": "a",
    "a\r\nb <b>c</b>\n<i>d</i><!-- --> <?php echo 1 ?> e&nbsp;<wbr>f": "a b c d e\xa0f",
    "a<div><svg>no</div>b": "a\nb",
    "": "",
    " \n": "",
    "<!-- a -->": "",
}


@pytest.mark.parametrize("page", SHOWN)
def test_html_is_what_a_page_shows(page, lxml):
    assert visible_text(page, "a.html") == SHOWN[page]


class Oracle(HTMLParser):
    """The text of a page by the standard library's parser, white space left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "svg")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "svg")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += "".join(data.split())


PIECES = [
    *(
        "word ",
        "天é",
        " 5 < 6 ",
        "&amp;",
        "&#65;",
        "&lt;p>",
        "\n\n",
        "<br>",
        "<hr/>",
        "a=b 'c' \"d\"",
        "<!-- <p> -- -->",
    ),
    *(
        "<a href=\"x>y\" b='<' c>",
        "</a>",
        "<DIV class=a/b>",
        "</div >",
        "<td\n>",
        "<p\tid = 'x'>",
        "</p>",
        '<x-y z="">',
    ),
    *(
        "<script>if (a < b) '<p>'</script>",
        "<style>\na > b {}</style>",
        "<svg><path d='M'/>no</svg>",
        "<!DOCTYPE html>",
    ),
]


def test_html_has_the_text_that_the_standard_library_finds(lxml):
    draw = random.Random(0)
    for _ in range(2000):
        page = "".join(draw.choices(PIECES, k=draw.randrange(12)))
        oracle = Oracle()
        oracle.feed(page)
        oracle.close()
        assert "".join(visible_text(page, "a.html").split()) == oracle.text, page


def test_html_is_the_same_however_it_is_cut(lxml, monkeypatch):
    draw = random.Random(1)
    for _ in range(100):
        page = "".join(draw.choices([*PIECES, "<pre>\r\n&notin; é</pre>", "\0", "🙂 "], k=draw.randrange(8)))
        monkeypatch.setattr(markup, "_PIECE", 1 << 18)
        whole = visible_text(page, "a.html")
        monkeypatch.setattr(markup, "_PIECE", draw.randrange(1, 8))
        assert visible_text(page, "a.html") == whole, page


def test_nothing_of_a_large_page_is_lost(lxml):
    # libxml2 stops after 10 MB in one text, name or value, and at 256 elements in one another, unless told otherwise.
    long, deep = "word " * (11 << 20 >> 2), 2000
    page = f"<p>{long}</p><a title='{long}'>a</a><!--{long}--><script>{long}</script>" + "<div>b" * deep
    assert visible_text(page, "a.html").split() == ["word"] * (11 << 20 >> 2) + ["a"] + ["b"] * deep


UNCLOSED = ["<p", "<p a='", '<p a="x>', "<p a=", "</p", "<!-- a --", "<!doctype", "<?xml", "<script>a</scrip", "<svg>a"]


@pytest.mark.parametrize("unit", [*UNCLOSED, "<style>", "<textarea>", "<noscript>a<p>", "a<svg><svg></svg>", "</"])
def test_truncated_html_is_refused(unit, lxml):
    for page in ("x" + unit, f"<html><body><p>x</p>{unit}"):
        with pytest.raises(MalformedError, match="is never closed: truncated"):
            visible_text(page, "a.html")


@pytest.mark.parametrize(
    "unit",
    [*UNCLOSED, "<", "</", "<!--", "<a ", "<![CDATA[", "&#", "<td>a", "<a/", "<title>", "a ", "<p>", "<div></x>"],
)
def test_damaged_html_is_refused_in_time_that_grows_with_its_size(unit, lxml):
    # The standard library's parser takes minutes for some of these, and libxml2 for the last.
    try:
        assert isinstance(visible_text(unit * 200_000, "a.html"), str)
    except MalformedError as error:
        assert len(str(error)) < 100


def test_what_html_needs_is_said(tmp_path, lxml, monkeypatch):
    path = tmp_path / "a.html"
    path.write_bytes(b"a")
    with monkeypatch.context() as patch:
        patch.setattr(lxml, "LIBXML_VERSION", (2, 13, 9))
        with pytest.raises(UserError, match=r"a\.html: reading it needs libxml2 2\.14 or newer.*pip install"):
            read_file(path)
    monkeypatch.setitem(sys.modules, "lxml.etree", None)
    with pytest.raises(UserError, match=r"a\.html: reading it needs lxml.*pip install 'retemper\[formats\]'"):
        read_file(path)
    (tmp_path / "a.md").write_bytes(b"<p>a")
    assert read_file(tmp_path / "a.md").values == ["<p>a"]


def test_html_files_and_their_charsets(tmp_path, lxml):
    body = "<p>naïve 天 “x”</p>"
    named = '<meta http-equiv="Content-Type" content="text/html; charset={}">'
    pages = {
        "plain": body.encode(),
        "BOM": b"\xef\xbb\xbf<meta charset=latin-1>" + body.encode(),
        "UTF-16": body.encode("utf-16"),
        "named": (named.format("gb2312") + body.replace("ï", "i")).encode("gb18030"),
        "meta": (named.format("shift_jis") + body.replace("ï", "i")).encode("cp932"),
        "xml": (b"<?xml version='1.0' encoding='euc-jp'?>" + body.replace("ï", "i").encode("euc-jp")),
        "unknown": b"<meta charset=nonsense>" + body.encode(),
        "a codec that is no charset": b"<meta charset=rot13>" + body.encode(),
    }
    path = tmp_path / "a.html"
    for name, content in pages.items():
        path.write_bytes(content)
        assert read_file(path).values[0].replace("i", "ï").replace("naïve", "naïve") == "naïve 天 “x”", name
    path.write_bytes(b"<meta charset=iso-8859-1>\x93na\xefve\x94")  # as browsers read it: cp1252
    assert read_file(path).values == ["“naïve”"]
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(pages["plain"]))
    assert read_file(tmp_path / "b.htm.gz").values == ["naïve 天 “x”"]


def test_what_is_wrong_with_an_html_file_is_said(tmp_path, lxml, monkeypatch):
    path = tmp_path / "a.html"
    bad = {
        b"<p>a\xff": "a.html: not valid UTF-8: byte 0xff at byte 5 of the file [invalid UTF-8]",
        b"<meta charset=gbk>\xff": "a.html: not valid GB18030: byte 0xff at byte 19 of the file [malformed]",
        b"\xff\xfea\0\0\xd8": "a.html: not valid UTF-16",
        b"<script>a": "a.html: a tag, a comment or an element such as <script> is never closed: truncated? [malformed]",
        b"<b>" * 5001: "a.html: 5004 elements are open, one in another; at most 5000 may be [malformed]",
    }
    for content, expected in bad.items():
        path.write_bytes(content)
        reading = read_file(path)
        assert (reading.values, len(reading.refused)) == ([], 1)
        assert reading.refused[0].startswith(expected)
    monkeypatch.setattr(markup, "_MAX_BYTES", 10)
    path.write_bytes(b"<p>12345678")
    assert "a.html: an HTML page of more than" in read_file(path).refused[0]
    path.write_bytes(b"<p>1234567")
    assert read_file(path).values == ["1234567"]


def test_markdown_is_kept_as_it_stands(tmp_path):
    source = "# Title\n\n* *one*\n```\n<p>\n```\n"
    path = Path(tmp_path / "a.markdown")
    path.write_bytes(b"\xef\xbb\xbf" + source.encode())
    assert read_file(path).values == [source]
    assert decode_html(source.encode()) == source
