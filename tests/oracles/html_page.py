"""A strict reader of HTML pages: what a page says, and that it is sound and needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects a page's text, tags and attributes, and refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """All text, runs of white space made one space."""
        return " ".join(" ".join(self.words).split())

    def require_self_contained(self) -> None:
        """Nothing is loaded from anywhere, no script runs, and no character stands there that HTML forbids."""
        assert not {"script", "link", "img", "iframe", "object", "embed"}.intersection(self.tags)
        references = [value for name, value in self.attributes if name in ("src", "href", "xlink:href", "data")]
        assert all(value.startswith("#") for value in references)
        assert not any(name.startswith("on") for name, _ in self.attributes)
        assert not re.search(r"url\((?!#)|@import", self.source)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", self.source)
