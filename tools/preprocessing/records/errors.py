"""Where a record stands in its file, and what may be wrong with it."""

from __future__ import annotations

from typing import NamedTuple

from ....engine.errors import UserError

_BLOCK_BYTES = 1 << 20


class Where(NamedTuple):
    """Where a record stands in its file. Finding a line's number may cost a pass over the file, so that is put off."""

    path: str
    unit: str = ""
    """"line", "row", "element", "page"...; empty: the whole file."""
    number: int = 0
    """From 1, counted from ``offset``."""
    offset: int = 0
    """Byte offset in the file from which lines are counted."""

    def describe(self) -> str:
        """``file:17`` for lines, ``file: row 17`` for other units."""
        if not self.unit:
            return self.path
        if self.unit == "line":
            return f"{self.path}:{count_newlines(self.path, 0, self.offset) + self.number}"
        return f"{self.path}: {self.unit} {self.number}"


class MalformedError(Exception):
    """Why a record is no document. ``kind`` is the short reason that is counted: "malformed" or "invalid UTF-8"."""

    def __init__(self, reason: str, kind: str = "malformed") -> None:
        super().__init__(reason)
        self.kind = kind


class LeftOutError(Exception):
    """The reason to leave out a document that is well-formed; counted."""


UNREADABLE = "unreadable rest of a file"
"""The reason that is counted for a file that ends early or is damaged."""


class DamagedError(UserError):
    """The rest of a file cannot be read: it is truncated or damaged. What comes before is read all the same."""


def count_newlines(path: str, start: int, stop: int) -> int:
    """Line feeds among the bytes [start, stop) of a file."""
    count = 0
    with open(path, "rb") as file:
        file.seek(start)
        while stop > start and (block := file.read(min(stop - start, _BLOCK_BYTES))):
            count += block.count(b"\n")
            start += len(block)
    return count
