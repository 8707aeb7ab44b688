"""The interface of readers: what they yield, and how they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UNREADABLE, DamagedError, Where
from .long_text import LongText


class Record(NamedTuple):
    """A record of the input: a mapping that contains the text, or the text itself."""

    value: dict[str, Any] | str | LongText
    where: Where
    raw: bytes | memoryview | None = None
    """Its bytes in the file, if the reader has them; of a long record the beginning. A view is valid until the next
    record is read."""


@dataclass(frozen=True)
class ReadOptions:
    """The user's options for readers, each of which uses those of its format."""

    quoting: str = "auto"
    """Of CSV and TSV: "standard" (RFC 4180), "none" (quotes are text), or "auto" (CSV standard, TSV none)."""
    sheets: tuple[str, ...] = ()
    """Sheets of a workbook to read; empty: those with the wanted columns."""
    max_expansion: int = 300
    """Maximum bytes that a compressed file may give per byte on disk; 0: no limit."""
    pdf_pages: bool = False
    """Each page of a PDF is a record; else the file."""
    skip_damage: bool = False
    """Report damage through ``ReadContext.refuse`` and continue after it, if possible."""


def _ignore(note: str) -> None:
    pass


@dataclass
class ReadContext:
    """What a reader shares with its worker while it reads one span."""

    refuse: Callable[[Where, str, str, bytes | str | None], None]
    """``refuse(where, reason, kind, raw)``: called for what is not a record. It raises UserError, or returns, and the
    reader continues with the next record. ``kind`` is counted, such as "malformed" or "invalid UTF-8"; ``raw`` is the
    record's bytes or text, if available."""
    scratch: Path
    """Folder for temporary files, which the reader removes."""
    consumed: int = 0
    """Input bytes of the span read so far; the reader updates it for the progress bar."""
    columns: tuple[str, ...] | None = None
    """Keys that are needed of each record; a reader may omit the others. None: all."""
    options: ReadOptions = ReadOptions()
    note: Callable[[str], None] = _ignore
    """Called with one-line remarks about a file that is read without errors."""


Reader = Callable[["Any", ReadContext], Iterator[Record]]
"""``read(span, context)`` yields the records of a span in order. It raises UserError if the whole file is unusable."""


def readable_part(records: Iterator[Any], path: str, context: ReadContext) -> Iterator[Any]:
    """Yield ``records`` of the file ``path``; with ``skip_damage``, report damage instead of raising DamagedError."""
    return _up_to_damage(records, path, context) if context.options.skip_damage else records


def _up_to_damage(records: Iterator[Any], path: str, context: ReadContext) -> Iterator[Any]:
    try:
        yield from records
    except DamagedError as error:
        context.refuse(Where(path), str(error).removeprefix(f"{path}: "), UNREADABLE, None)
