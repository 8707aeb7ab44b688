"""Parquet files, row group by row group: a record for each row, with the wanted columns only.

Memory holds a batch of rows, not a row group. Leaves out encrypted files, and folders of partitions as one table (each
of their files is read like any other, without the columns that stand in the folders' names).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....engine.errors import UserError
from ..formats import require_library
from ..records import MalformedError, ReadContext, Record, Where
from ..tasks import Span
from .columns import usable_columns
from .streams import damage_is_user_error, iterate_checked, open_stream

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024
_READ_BYTES = 1 << 20
_NOT_IN_PYTHON = (ValueError, ArithmeticError, TypeError, NotImplementedError)


def count_units(path: str) -> int:
    """Number of row groups.

    Raises:
        UserError: it is no Parquet file, or cannot be read.
    """
    with damage_is_user_error(path, "Parquet"), open(path, "rb") as file:
        return _open(file, path).metadata.num_row_groups


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The rows of the row groups of ``span``."""
    file = span.file
    with open_stream(file, context) as stream:
        parquet = _open(stream, file.path)
        with damage_is_user_error(file.path, "Parquet"):
            groups = [parquet.metadata.row_group(index) for index in range(parquet.metadata.num_row_groups)]
            there = parquet.schema_arrow.names
            # Rows and bytes of each.
            sizes = [(group.num_rows, max(group.total_byte_size, 1)) for group in groups]
        if len(sizes) != file.units:
            raise UserError(f"{file.path}: had {file.units} row groups and has {len(sizes)} now; start again")
        if not usable_columns(there, Where(file.path), context):
            return
        names = [name for name in there if context.columns is None or name in context.columns]
        number = sum(rows for rows, _ in sizes[: span.start])
        first, total = number, max(sum(rows for rows, _ in sizes[span.start : span.stop]), 1)
        for index in range(span.start, span.stop):
            rows, size = sizes[index]
            batch_rows = min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES * rows // size))
            with damage_is_user_error(file.path, "Parquet"):
                batches = parquet.iter_batches(batch_rows, row_groups=[index], columns=names, use_threads=False)
            stop = number + rows
            for batch in iterate_checked(batches, file.path, "Parquet"):
                context.consumed = span.num_bytes * (number - first) // total
                yield from _records(batch, names, number, context, file.path)
                number += batch.num_rows
            if number != stop:
                raise UserError(f"{file.path}: damaged: row group {index + 1} ends before row {stop}; copy it again")
        context.consumed = span.num_bytes


def _open(file: Any, path: str) -> Any:
    parquet = require_library("pyarrow.parquet", path)
    with damage_is_user_error(path, "Parquet"):
        # Without pre_buffer and with a buffer, columns are read as they are decoded instead of whole.
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)


def _records(batch: Any, names: list[str], number: int, context: ReadContext, path: str) -> Iterator[Record]:
    """The rows of ``batch``, of which the first is the file's row ``number``, from 0."""
    columns = [batch.column(name) for name in names]
    try:
        values = [column.to_pylist() for column in columns]
    except _NOT_IN_PYTHON:
        # A value of some row cannot be had in Python, such as a string that is not UTF-8.
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
