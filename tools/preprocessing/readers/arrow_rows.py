"""Converts rows of Arrow record batches to records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..formats import require_library
from ..records.errors import MalformedError, Where
from ..records.reading import ReadContext, Record

_VIEW_BYTES = 16
_NOT_IN_PYTHON = (ValueError, ArithmeticError, TypeError, NotImplementedError)


def batch_records(batch: Any, names: list[str], number: int, context: ReadContext, path: str) -> Iterator[Record]:
    """Yield the rows of ``batch``; its first row is row ``number`` of the file, from 0."""
    columns = [batch.column(name) for name in names]
    try:
        values = [column.to_pylist() for column in columns]
    except _NOT_IN_PYTHON:
        # A value of some row cannot be converted, such as a string that is not UTF-8.
        for index in range(batch.num_rows):
            where = Where(path, "row", number + index + 1)
            try:
                record = {name: _value(column[index], name) for name, column in zip(names, columns, strict=True)}
            except MalformedError as error:
                context.refuse(where, str(error), error.kind, None)
                continue
            yield Record(record, where)
        return
    rows = zip(*values, strict=True) if names else [()] * batch.num_rows
    for index, row in enumerate(rows, number + 1):
        yield Record(dict(zip(names, row, strict=True)), Where(path, "row", index))


def _value(scalar: Any, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        reason = f"column {name!r} is not valid UTF-8: byte 0x{found:02x} at byte {error.start + 1}"
        raise MalformedError(reason, "invalid UTF-8") from None
    except _NOT_IN_PYTHON as error:
        raise MalformedError(f"column {name!r}: {error}") from None


def decoded_bytes(batch: Any, path: str) -> int:
    """Return the bytes of the rows of ``batch``; a dictionary's value counts as often as it occurs."""
    compute = require_library("pyarrow.compute", path)
    total = 0
    for column in batch.columns:
        lengths = _entry_lengths(column, compute)
        if lengths is not None:
            total += compute.sum(lengths.take(column.indices)).as_py() or 0
        elif "_view" in str(column.type):
            total += _VIEW_BYTES * len(column)  # its buffers contain the texts of other rows too
        else:
            total += column.nbytes
    return total


def longest_entry(batch: Any, path: str) -> int:
    """Return the bytes of the longest value in the dictionaries of ``batch``; 1 without any."""
    compute = require_library("pyarrow.compute", path)
    lengths = [_entry_lengths(column, compute) for column in batch.columns]
    return max([1, *(compute.max(entry).as_py() or 0 for entry in lengths if entry is not None)])


def _entry_lengths(column: Any, compute: Any) -> Any:
    """Return the bytes of each entry in a string column's dictionary; None for other columns."""
    dictionary = getattr(column, "dictionary", None)
    if dictionary is None or str(dictionary.type) not in ("string", "large_string", "binary", "large_binary"):
        return None
    return compute.binary_length(dictionary)
