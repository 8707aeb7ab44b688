"""Parquet files: each row is a record, with the needed columns only. Memory holds a batch of rows, not a row group.

Not supported: encrypted files, and columns in the folder names of partitioned tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ....engine.errors import UserError
from ..formats import require_library
from ..records.errors import UNREADABLE, DamagedError, Where
from ..records.reading import ReadContext, Record
from ..storage import open_file
from ..workers.tasks import Span
from .arrow_rows import batch_records, decoded_bytes
from .columns import usable_columns
from .expansion_limit import ExpansionLimit
from .streams import damage_is_user_error, iterate_checked, open_stream

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024
_READ_BYTES = 1 << 20
_FEW_BYTES = 16
"""Of a row on disk; texts take more, except repeated ones."""
_MAX_REPEATED_BYTES = 64 << 20


def count_units(path: str) -> int:
    """Return the number of row groups. Raise UserError if it is not a readable Parquet file."""
    with damage_is_user_error(path, "Parquet"), open_file(path, "part") as file:
        return _open(file, path).metadata.num_row_groups


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the rows of the row groups of ``span``."""
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
        ExpansionLimit(file.path, file.size, context.options.max_expansion).check_rows(
            sum(rows for rows, _ in sizes), file.size
        )
        names = [name for name in there if context.columns is None or name in context.columns]
        number = sum(rows for rows, _ in sizes[: span.start])
        first, total = number, max(sum(rows for rows, _ in sizes[span.start : span.stop]), 1)
        for index in range(span.start, span.stop):
            stop = number + sizes[index][0]
            group = _RowGroup(parquet, index, names, file.path, context)
            try:
                for batch in group.batches():
                    context.consumed = span.num_bytes * (number - first) // total
                    yield from batch_records(batch, names, number, context, file.path)
                    number += batch.num_rows
                if number != stop:
                    reason = f"damaged: row group {index + 1} ends before row {stop}; copy it again"
                    raise DamagedError(f"{file.path}: {reason}")
            except DamagedError as error:
                if not context.options.skip_damage:
                    raise
                where = Where(file.path, "row", number + 1)
                reason = f"the rest of row group {index + 1}: {str(error).removeprefix(f'{file.path}: ')}"
                context.refuse(where, reason, UNREADABLE, None)
                number = stop
        context.consumed = span.num_bytes


class _RowGroup:
    """Reads the needed columns of one row group, in batches that fit in memory for any expansion."""

    def __init__(self, parquet: Any, index: int, names: list[str], path: str, context: ReadContext) -> None:
        self._parquet, self._index, self._names, self._path = parquet, index, names, path
        with damage_is_user_error(path, "Parquet"):
            group = parquet.metadata.row_group(index)
            columns = [group.column(number) for number in range(group.num_columns)]
            wanted = [column for column in columns if column.path_in_schema.partition(".")[0] in self._roots()]
            self._rows, self._bytes = group.num_rows, max(group.total_byte_size, 1)
            self._on_disk = sum(column.total_compressed_size for column in wanted)
            self._decoded = sum(column.total_uncompressed_size for column in wanted)
            values = max((column.num_values for column in wanted), default=0)
        ExpansionLimit(path, self._on_disk, context.options.max_expansion).check(self._on_disk, self._decoded)
        self._expansion = ExpansionLimit(path, self._on_disk, context.options.max_expansion)
        self._expansion.check_rows(max(values, self._rows if wanted else 0), self._on_disk)

    def batches(self) -> Iterator[Any]:
        """Yield the rows in batches. Raise DamagedError if they cannot be read, UserError if they expand too much."""
        batch_rows = min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES * self._rows // self._bytes))
        if self._on_disk < _FEW_BYTES * self._rows:
            # Rows repeat values of a dictionary, which may be long: a row may be as large as all decoded bytes.
            batch_rows = min(batch_rows, max(1, _MAX_REPEATED_BYTES // max(self._decoded, 1)))
        with damage_is_user_error(self._path, "Parquet"):
            batches = self._parquet.iter_batches(
                batch_rows, row_groups=[self._index], columns=self._names, use_threads=False
            )
        produced, rows = 0, 0
        for batch in iterate_checked(batches, self._path, "Parquet"):
            produced += decoded_bytes(batch, self._path)
            rows += batch.num_rows
            self._expansion.check(self._on_disk * rows // max(self._rows, 1), produced)
            yield batch

    def _roots(self) -> set[str]:
        # Dots in a column's name look like the path of a nested column.
        return {root for name in self._names for root in (name, name.partition(".")[0])}


def _open(file: Any, path: str) -> Any:
    parquet = require_library("pyarrow.parquet", path)
    with damage_is_user_error(path, "Parquet"):
        # Without pre_buffer, and with a buffer, columns are read while they are decoded.
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)
