"""CSV and TSV with a header: each row is a record of its cells, all of them strings.

Quoting is that of RFC 4180, strictly. Rows are named by the line of the file on which they begin, as editors show it.
Columns without a name (such as the index that pandas writes) are left out. Leaves out other separators, and guessing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from ....engine.errors import UserError
from ..json_records import invalid_utf8
from ..records import MalformedError, ReadContext, Record, Where
from ..tasks import Span
from .columns import usable_columns
from .streams import open_stream, skip_bom

_MAX_CELL = 1 << 24
"""Characters. The csv module holds four bytes for each; and this ends a quote that is never closed."""
_MAX_LINE_BYTES = 1 << 26
_SEPARATORS = {"csv": ",", "tsv": "\t"}


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The rows below the header."""
    path = span.file.path
    csv.field_size_limit(_MAX_CELL)
    with open_stream(span.file, context) as stream:
        skip_bom(stream, path)
        lines = _Lines(stream, path)
        names: list[str] | None = None
        for where, cells, wrong in _rows(lines, _SEPARATORS[span.file.format]):
            if names is None:
                if wrong:
                    raise UserError(f"{where.describe()}: the header is malformed: {wrong}")
                names = cells
                if not usable_columns(names, where, context):
                    return
                continue
            if wrong is None and len(cells) != len(names):
                wrong = MalformedError(f"{len(cells)} cells, where the header has {len(names)}")
            if wrong:
                context.refuse(where, str(wrong), wrong.kind, lines.raw())
                continue
            record = dict(zip(names, cells, strict=True))
            record.pop("", None)
            yield Record(record, where)


def _rows(lines: _Lines, separator: str) -> Iterator[tuple[Where, list[str], MalformedError | None]]:
    """For each row where it begins, its cells and what is wrong with it; blank lines are nothing."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
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
                raise UserError(
                    f"{where.describe()}: {wrong}, which hides where the next rows begin; mend it"
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
        return f"quotes that are not as CSV has them ({reason}): a cell in quotes has its own quotes doubled"
    if "new-line character" in reason:
        return "a carriage return that ends no line, outside of quotes"
    return reason


class _Lines:
    """The lines of a file as text, as the csv module takes them, and what it would not notice in them."""

    def __init__(self, stream: io.BufferedReader[Any], path: str) -> None:
        self._stream, self._path = stream, path
        self._number = 0
        self._row: list[bytes] = []
        self.wrong: MalformedError | None = None
        """Why the current row is no text."""

    def begin_row(self) -> Where:
        """The next line begins a row: where."""
        self._row, self.wrong = [], None
        return Where(self._path, "line", self._number + 1)

    def row_is_open(self, error: csv.Error) -> bool:
        """Whether ``error`` is about a quote that went over lines without an end."""
        return len(self._row) > 1 and ("field limit" in str(error) or "unexpected end" in str(error))

    def raw(self) -> bytes:
        """The current row as it stands in the file."""
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
            # Python 3.10's csv refuses them, later ones do not; binary files and UTF-16 are full of them.
            self.wrong = self.wrong or MalformedError("a NUL byte")
            text = text.replace("\0", "")
        return text
