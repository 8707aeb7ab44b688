"""What readers give, whatever the format: records, where each stood, and what was wrong with those that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .long_text import LongText

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


class Record(NamedTuple):
    """One record of the input: a mapping of which the text is yet to be chosen, or the text itself."""

    value: dict[str, Any] | str | LongText
    where: Where


class MalformedError(Exception):
    """Why a record is no document. ``kind`` is the short reason that is counted: "malformed" or "invalid UTF-8"."""

    def __init__(self, reason: str, kind: str = "malformed") -> None:
        super().__init__(reason)
        self.kind = kind


class LeftOutError(Exception):
    """The reason to leave out a document that is well-formed; counted."""


@dataclass
class ReadContext:
    """What a reader shares with its worker while it reads one span."""

    refuse: Callable[[Where, str, str, bytes | str | None], None]
    """``refuse(where, reason, kind, raw)``: called for what is no record. It raises UserError, which the reader lets
    pass, or returns, and the reader goes on with the next record. ``kind`` is a short reason to count, such as
    "malformed" or "invalid UTF-8"; ``raw`` the record's bytes or text where it has them."""
    scratch: Path
    """Folder for temporary files, removed by the caller."""
    consumed: int = 0
    """Input bytes of the span read so far, which the reader keeps up to date for the progress bar."""
    columns: tuple[str, ...] | None = None
    """The keys that are wanted of each record, for readers that can spare the others; None: all."""


Reader = Callable[["Any", ReadContext], Iterator[Record]]
"""``read(span, context)``: the records of a span, in order. Raises UserError for what damages the file as a whole."""


def count_newlines(path: str, start: int, stop: int) -> int:
    """Line feeds among the bytes [start, stop) of a file."""
    count = 0
    with open(path, "rb") as file:
        file.seek(start)
        while stop > start and (block := file.read(min(stop - start, _BLOCK_BYTES))):
            count += block.count(b"\n")
            start += len(block)
    return count
