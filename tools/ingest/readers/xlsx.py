"""Excel workbooks (.xlsx): each row of each sheet is a record; a sheet's first row that is not empty is its header.

Strings are kept, other values are numbers, dates and booleans of Python; formulas are the results that were saved with
them. Cells of columns without a name are left out. Shared strings are held in memory, as the format wants. Leaves out
.xls, charts and comments.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from ....engine.errors import UserError
from ..formats import require_library
from ..records import ReadContext, Record, Where
from ..tasks import Span
from .columns import usable_columns
from .streams import damage_is_user_error, iterate_checked, open_stream

_MAX_ROWS = 1 << 20  # of Excel itself
_OLE_MAGIC = b"\xd0\xcf\x11\xe0"
_ESCAPE = re.compile(r"_x(?!D[89A-F])([0-9A-F]{4})_", re.IGNORECASE)


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The rows of all sheets, in the order of the workbook."""
    path = span.file.path
    openpyxl = require_library("openpyxl", path)
    # It warns of parts of a workbook that are no text, such as styles.
    warnings.filterwarnings("ignore", module="openpyxl")
    with open_stream(span.file, context) as stream:
        if stream.peek(4)[:4] == _OLE_MAGIC:
            raise UserError(f"{path}: locked with a password, or an old .xls; save it as .xlsx without a password")
        with damage_is_user_error(path, "XLSX"):
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True, keep_links=False)
        for sheet in book.worksheets:
            yield from _rows(sheet, path, context)
        context.consumed = span.file.size


def _rows(sheet: Any, path: str, context: ReadContext) -> Iterator[Record]:
    names: list[str] | None = None
    sheet.reset_dimensions()  # they are often wrong
    rows = sheet.iter_rows(values_only=True, max_row=_MAX_ROWS)
    for number, cells in enumerate(iterate_checked(rows, path, "XLSX"), 1):
        if all(cell is None for cell in cells):
            continue
        where = Where(path, f"sheet {sheet.title!r} row", number)
        values = [_unescape(cell) if isinstance(cell, str) else cell for cell in cells]
        if names is None:
            names = ["" if value is None else str(value) for value in values]
            if not usable_columns(names, where, context):
                return
            continue
        values += [None] * (len(names) - len(values))
        record = dict(zip(names, values, strict=False))
        record.pop("", None)
        yield Record(record, where)


def _unescape(text: str) -> str:
    """Undo the format's way of writing characters that XML cannot hold, which openpyxl leaves: _x000D_ for CR."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text) if "_x" in text else text
