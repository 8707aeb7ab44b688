"""CSV and TSV with a header: each row is a record of strings.

CSV has the quoting of RFC 4180, strictly; TSV has none (IANA, text/tab-separated-values); ``--quoting`` changes both.
The place of a row is the line on which it begins, as in editors. Columns without a name (such as the index that pandas
writes) are left out. Other separators are not supported.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any, Literal

from ....engine.errors import UserError
from ..records.errors import DamagedError, MalformedError, Where
from ..records.json_values import invalid_utf8
from ..records.reading import ReadContext, Record
from ..workers.tasks import Span
from .columns import usable_columns
from .streams import open_stream, skip_bom

_MAX_CELL = 1 << 24
"""Characters. The csv module needs four bytes for each. The limit also ends a quote that is never closed."""
_MAX_LINE_BYTES = 1 << 26
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_UNQUOTED = ("tsv",)
_HEADER_BYTES = 1 << 16
_MANY_LINES = 200
"""A quoted cell over more lines gets a note: its quote may be text."""
_NUMBER = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*")


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the rows below the header."""
    path = span.file.path
    csv.field_size_limit(_MAX_CELL)
    separator = _SEPARATORS[span.file.format]
    with open_stream(span.file, context) as stream:
        skip_bom(stream, path)
        lines, quotes = _Lines(stream, path), _Quotes(context, separator)
        quotes.decide(stream, span.file.format)
        names: list[str] | None = None
        for where, cells, wrong in _rows(lines, separator, quotes.quoted):
            if names is None:
                if wrong:
                    raise UserError(f"{where.describe()}: the header is malformed: {wrong}")
                names = cells
                if not usable_columns(names, where, context):
                    return
                continue
            if wrong is None and len(cells) != len(names):
                hint = "" if quotes.quoted else "; if cells are in quotes, give --quoting standard"
                wrong = MalformedError(f"{len(cells)} cells, where the header has {len(names)}{hint}")
            wrong = wrong or quotes.check(where, cells, lines)
            if wrong:
                context.refuse(where, str(wrong), wrong.kind, lines.raw())
                continue
            record = dict(zip(names, cells, strict=True))
            record.pop("", None)
            yield Record(record, where)
    quotes.report()


class _Quotes:
    """Decides whether quotes are syntax or text in a file, and collects signs that this is wrong."""

    def __init__(self, context: ReadContext, separator: str) -> None:
        self.quoted = context.options.quoting == "standard"
        self._decides = context.options.quoting == "auto"
        self._context, self._separator = context, separator
        self._longest, self._longest_at = 0, ""
        self._looks_quoted = ""

    def decide(self, stream: io.BufferedReader[Any], format_name: str) -> None:
        """With ``--quoting auto``, choose by the format and the header, which comes next in ``stream``."""
        if self._decides:
            # All names of the header in quotes: the file uses quoting.
            first = stream.peek(_HEADER_BYTES)[:_HEADER_BYTES].partition(b"\n")[0].rstrip(b"\r")
            self.quoted = format_name not in _UNQUOTED or all(
                len(name) > 1 and name[:1] == name[-1:] == b'"' for name in first.split(self._separator.encode())
            )

    def check(self, where: Where, cells: list[str], lines: _Lines) -> MalformedError | None:
        """Return an error for a row that follows the rules but was probably not meant so."""
        if lines.num_lines > 1:
            if self._decides and _is_several_rows(lines.raw(), self._separator, len(cells)):
                return MalformedError(
                    f"a quote over {lines.num_lines} lines, although each line alone is a row; if quotes are text "
                    "here, give --quoting none, else --quoting standard"
                )
            if lines.num_lines > self._longest:
                self._longest, self._longest_at = lines.num_lines, where.describe()
        elif self._decides and not self.quoted and not self._looks_quoted and _looks_quoted(cells):
            self._looks_quoted = where.describe()
        return None

    def report(self) -> None:
        """Report what is suspicious in the file."""
        if self._longest > _MANY_LINES:
            self._context.note(
                f"{self._longest_at}: a quoted cell spans {self._longest:,} lines; if quotes are text, give "
                "--quoting none"
            )
        if self._looks_quoted:
            self._context.note(
                f"{self._looks_quoted}: cells seem to be quoted, and the quotes are kept as text; --quoting "
                "standard removes them"
            )


def _is_several_rows(raw: bytes, separator: str, num_cells: int) -> bool:
    """Return whether a row over several lines is probably several rows, two of them with a stray quotation mark.

    Each line then has a row's number of cells, numbers in the same columns, and neither a space nor the line's end
    after a separator; prose has one of them after nearly every comma. A single column cannot be distinguished from
    text.
    """
    rows = [line.split(separator) for line in raw.decode("utf-8", "replace").splitlines()]
    if num_cells < 2 or any(len(row) != num_cells for row in rows):
        return False
    if any(cell.startswith(" ") for row in rows for cell in row[1:]) or any(not row[-1] for row in rows[:-1]):
        return False
    kinds = [[_NUMBER.fullmatch(cell.strip('"')) is not None for cell in row] for row in rows]
    return all(kind == kinds[0] for kind in kinds)


def _looks_quoted(cells: list[str]) -> bool:
    return any(cell[:1] == cell[-1:] == '"' and '""' in cell[1:-1] for cell in cells)


def _rows(lines: _Lines, separator: str, quoted: bool) -> Iterator[tuple[Where, list[str], MalformedError | None]]:
    """Yield for each row its place, its cells and an error or None; skip blank lines."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=separator, strict=True, quoting=quoting)
    while True:
        where = lines.begin_row()
        cells: list[str] = []
        wrong = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = MalformedError(_explain(error))
            if lines.row_is_open(error):
                raise DamagedError(
                    f"{where.describe()}: {wrong}, which hides where the next rows begin; fix it, or give --quoting "
                    "none if quotes are text"
                ) from None
        wrong = lines.wrong or wrong
        if cells or wrong:
            yield where, cells, wrong


def _explain(error: csv.Error) -> str:
    reason = str(error)
    if "field limit" in reason:
        return f"a cell of more than {_MAX_CELL:,} characters, or a quote that is not closed"
    if "unexpected end of data" in reason:
        return "a quote that is not closed"
    if "expected after" in reason:
        return (
            f"quotes that break the rules of CSV ({reason}): a quote inside a quoted cell must be doubled; "
            "--quoting none treats quotes as text"
        )
    if "new-line character" in reason:
        return "a carriage return that ends no line, outside of quotes"
    return reason


class _Lines:
    """The lines of a file for the csv module, with checks that it does not make."""

    def __init__(self, stream: io.BufferedReader[Any], path: str) -> None:
        self._stream, self._path = stream, path
        self._number = 0
        self._row: list[bytes] = []
        self.wrong: MalformedError | None = None
        """Error of the current row, if it is not text."""

    def begin_row(self) -> Where:
        """Begin a row at the next line; return its place."""
        self._row, self.wrong = [], None
        return Where(self._path, "line", self._number + 1)

    def row_is_open(self, error: csv.Error) -> bool:
        """Return whether ``error`` is about a quote that spans lines and does not end."""
        return len(self._row) > 1 and ("field limit" in str(error) or "unexpected end" in str(error))

    @property
    def num_lines(self) -> int:
        """Lines of the current row."""
        return len(self._row)

    def raw(self) -> bytes:
        """Return the current row's bytes in the file."""
        return b"".join(self._row)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(_MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self._number += 1
        if len(line) == _MAX_LINE_BYTES:
            raise UserError(f"{self._path}:{self._number}: a line of more than {_MAX_LINE_BYTES:,} bytes; use JSONL")
        self._row.append(line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.wrong = self.wrong or invalid_utf8(line, error)
            text = line.decode("utf-8", "replace")
        if "\0" in text:
            # Only Python 3.10's csv refuses them. Binary files and UTF-16 are full of them.
            self.wrong = self.wrong or MalformedError("a NUL byte")
            text = text.replace("\0", "")
        return text
