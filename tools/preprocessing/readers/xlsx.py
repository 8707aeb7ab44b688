"""Excel workbooks (.xlsx): each row is a record; the first nonempty row of a sheet is its header.

Sheets with a needed column are read; others, such as a cover, are left out with a note, unless ``--sheet`` names them.
Values are strings, numbers, dates and booleans; formulas are their saved results. Columns without a name are left out.
Shared strings are held in memory. Not supported: .xls, charts and comments.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ....engine.errors import UserError
from ..formats import require_library
from ..records.errors import DamagedError, Where
from ..records.reading import ReadContext, Record, readable_part
from ..workers.tasks import Span
from .columns import usable_columns
from .expansion_limit import ExpansionLimit
from .streams import damage_is_user_error, iterate_checked, open_stream

_MAX_ROWS = 1 << 20  # of Excel itself
_SHOWN = 8
_OLE_MAGIC = b"\xd0\xcf\x11\xe0"
_ESCAPE = re.compile(r"_x(?!D[89A-F])([0-9A-F]{4})_", re.IGNORECASE)


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the rows of the sheets, in the order of the workbook."""
    path = span.file.path
    openpyxl = require_library("openpyxl", path)
    # It warns about parts of a workbook without text, such as styles.
    warnings.filterwarnings("ignore", module="openpyxl")
    with open_stream(span.file, context) as stream:
        if stream.peek(4)[:4] == _OLE_MAGIC:
            raise UserError(f"{path}: locked with a password, or an old .xls; save it as .xlsx without a password")
        with damage_is_user_error(path, "XLSX"):
            _check_expansion(stream, path, context.options.max_expansion)
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True, keep_links=False)
        for sheet in _chosen_sheets(book.worksheets, path, context):
            yield from readable_part(_rows(sheet, path, context), path, context)
        context.consumed = span.file.size


def _check_expansion(stream: IO[bytes], path: str, ratio: int) -> None:
    """Refuse a workbook with a part that expands too much, by the sizes in the ZIP archive."""
    with zipfile.ZipFile(stream) as archive:
        for part in archive.infolist():
            ExpansionLimit(path, part.compress_size, ratio).check(part.compress_size, part.file_size)
    stream.seek(0)


def _chosen_sheets(sheets: Sequence[Any], path: str, context: ReadContext) -> Sequence[Any]:
    """Return the sheets to read. Raise UserError if a sheet of ``--sheet`` does not exist."""
    names, wanted = [sheet.title for sheet in sheets], context.options.sheets
    if wanted:
        absent = next((name for name in wanted if name not in names), None)
        if absent is not None:
            raise UserError(f"{path}: no sheet {absent!r} (sheets there: {', '.join(map(repr, names))}); see --sheet")
        return [sheet for sheet in sheets if sheet.title in wanted]
    if context.columns is None or len(sheets) < 2:
        return sheets
    headers = {sheet.title: _header(sheet, path) for sheet in sheets}
    with_column = [sheet for sheet in sheets if not set(context.columns).isdisjoint(headers[sheet.title])]
    others = [repr(name) for name in names if headers[name] and name not in {sheet.title for sheet in with_column}]
    if with_column and others:
        columns = " or ".join(map(repr, context.columns))
        context.note(f"{path}: left out {_list(others)}, without a column {columns}; --sheet NAME reads a sheet")
    return with_column or sheets


def _header(sheet: Any, path: str) -> list[str]:
    """Return the column names in the first nonempty row of a sheet; [] if there is none."""
    try:
        return next((_names(cells) for _, cells in _filled_rows(sheet, path)), [])
    except DamagedError:
        return []  # reported when the sheet is read


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"sheet{'s' if len(names) > 1 else ''} {', '.join(names[:_SHOWN])}{more}"


def _filled_rows(sheet: Any, path: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the nonempty rows with their numbers from 1."""
    sheet.reset_dimensions()  # they are often wrong
    rows = sheet.iter_rows(values_only=True, max_row=_MAX_ROWS)
    for number, cells in enumerate(iterate_checked(rows, path, "XLSX"), 1):
        if any(cell is not None for cell in cells):
            yield number, cells


def _names(cells: Sequence[Any]) -> list[str]:
    return ["" if cell is None else _unescape(str(cell)) for cell in cells]


def _rows(sheet: Any, path: str, context: ReadContext) -> Iterator[Record]:
    names: list[str] | None = None
    for number, cells in _filled_rows(sheet, path):
        where = Where(path, f"sheet {sheet.title!r} row", number)
        if names is None:
            names = _names(cells)
            if not usable_columns(names, where, context):
                return
            continue
        values = [_unescape(cell) if isinstance(cell, str) else cell for cell in cells]
        values += [None] * (len(names) - len(values))
        record = dict(zip(names, values, strict=False))
        record.pop("", None)
        yield Record(record, where)


def _unescape(text: str) -> str:
    """Replace escapes of characters that XML cannot contain, such as _x000D_ for CR; openpyxl keeps them."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text) if "_x" in text else text
