"""What readers give, whatever the format: records, each with its place, and how readers are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UNREADABLE, DamagedError, Where
from .long_text import LongText


class Record(NamedTuple):
    """One record of the input: a mapping of which the text is yet to be chosen, or the text itself."""

    value: dict[str, Any] | str | LongText
    where: Where
    raw: bytes | None = None
    """As it is in the file, where the reader has it; of a long one the beginning."""


@dataclass(frozen=True)
class ReadOptions:
    """How the user wants files read. Readers take what concerns their format."""

    quoting: str = "auto"
    """Of CSV and TSV: "standard" (RFC 4180), "none" (quotes are text), or "auto" (CSV standard, TSV none)."""
    sheets: tuple[str, ...] = ()
    """Sheets of a workbook to read; empty: those with the wanted columns."""
    max_expansion: int = 300
    """Bytes that a compressed file may give for each byte on disk; 0: any number."""
    skip_damage: bool = False
    """Report damage by ``ReadContext.refuse`` and continue behind it, where that is possible."""


def _ignore(note: str) -> None:
    pass


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
    options: ReadOptions = ReadOptions()
    note: Callable[[str], None] = _ignore
    """Called with what is worth knowing about a file that is read without errors, one line each."""


Reader = Callable[["Any", ReadContext], Iterator[Record]]
"""``read(span, context)``: the records of a span, in order. Raises UserError for what damages the file as a whole."""


def readable_part(records: Iterator[Any], path: str, context: ReadContext) -> Iterator[Any]:
    """``records`` of the file ``path``, up to where it is damaged.

    Raises:
        DamagedError: it is damaged, and ``context.options.skip_damage`` is not set.
    """
    return _up_to_damage(records, path, context) if context.options.skip_damage else records


def _up_to_damage(records: Iterator[Any], path: str, context: ReadContext) -> Iterator[Any]:
    try:
        yield from records
    except DamagedError as error:
        context.refuse(Where(path), str(error).removeprefix(f"{path}: "), UNREADABLE, None)
