"""The place of a record in its file, and the errors of records and files."""

from __future__ import annotations

from typing import NamedTuple

from ....engine.errors import UserError
from ....engine.files.paths import is_url

_BLOCK_BYTES = 1 << 20


class Where(NamedTuple):
    """The place of a record in its file. The number of a line is found late: it may take a pass over the file."""

    path: str
    unit: str = ""
    """"line", "row", "element", "page"...; empty: the whole file."""
    number: int = 0
    """From 1, counted from ``offset``."""
    offset: int = 0
    """Byte offset from which lines are counted."""

    def describe(self) -> str:
        """Return ``file:17`` for lines, ``file: row 17`` for other units; in remote files the byte of a line."""
        if not self.unit:
            return self.path
        if self.unit == "line" and is_url(self.path) and self.offset:
            # Counting lines would read the file again.
            return f"{self.path}: line at byte {self.offset}"
        if self.unit == "line":
            before = count_newlines(self.path, 0, self.offset) if self.offset else 0
            return f"{self.path}:{before + self.number}"
        return f"{self.path}: {self.unit} {self.number}"


class MalformedError(Exception):
    """A record is not a document. ``kind`` is the reason that is counted: "malformed" or "invalid UTF-8"."""

    def __init__(self, reason: str, kind: str = "malformed") -> None:
        super().__init__(reason)
        self.kind = kind


class LeftOutError(Exception):
    """A well-formed document is left out; the message is counted."""


UNREADABLE = "unreadable rest of a file"
"""The counted reason for a file that ends early or is damaged."""


class DamagedError(UserError):
    """The rest of a file cannot be read, because it is truncated or damaged."""


def count_newlines(path: str, start: int, stop: int) -> int:
    """Count line feeds in the bytes [start, stop) of a file."""
    count = 0
    with open(path, "rb") as file:
        file.seek(start)
        while stop > start and (block := file.read(min(stop - start, _BLOCK_BYTES))):
            count += block.count(b"\n")
            start += len(block)
    return count
