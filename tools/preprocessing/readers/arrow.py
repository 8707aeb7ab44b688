"""Arrow IPC files and streams, as written by ``datasets.save_to_disk``, Feather and the cache of datasets.

Each row is a record, with the needed columns only. Files are memory-mapped, so that a batch costs only the rows in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ....engine.errors import UserError
from ....engine.files.paths import is_url
from ..formats import require_library
from ..inputs.files import InputFile
from ..records.errors import DamagedError, Where
from ..records.reading import ReadContext, Record
from ..workers.tasks import Span
from .arrow_rows import batch_records, decoded_bytes, longest_entry
from .columns import usable_columns
from .expansion_limit import ExpansionLimit
from .streams import check_unchanged, damage_is_user_error, iterate_checked, open_unchanged

_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"
_SLICE_ROWS = 1024
_SLICE_BYTES = 4 << 20
_MAX_REPEATED_BYTES = 64 << 20


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the rows of the file."""
    file, path = span.file, span.file.path
    arrow = require_library("pyarrow", path)
    require_library("pyarrow.ipc", path)
    with _source(arrow, file) as source:
        if not file.size:
            raise DamagedError(f"{path}: an empty file, not a valid Arrow file; copy it again")
        schema, batches = _batches(arrow, source, path)
        if not usable_columns(schema.names, Where(path), context):
            return
        names = [name for name in schema.names if context.columns is None or name in context.columns]
        expansion = ExpansionLimit(path, file.size, context.options.max_expansion)
        number, produced = 0, 0
        for batch in iterate_checked(batches, path, "Arrow"):
            expansion.check_rows(number + batch.num_rows, file.size)
            with damage_is_user_error(path, "Arrow"):
                chosen = batch.select(names)
                chosen.validate()
                step = min(_slice_rows(chosen), max(1, _MAX_REPEATED_BYTES // longest_entry(chosen, path)))
            for start in range(0, batch.num_rows, step):
                with damage_is_user_error(path, "Arrow"):
                    part = chosen.slice(start, step)
                    produced += decoded_bytes(part, path)
                expansion.check(source.tell(), produced)
                yield from batch_records(part, names, number, context, path)
                number += part.num_rows
            context.consumed = min(source.tell(), file.size)
        context.consumed = file.size


@contextmanager
def _source(arrow: Any, file: InputFile) -> Iterator[Any]:
    """Open a file for pyarrow; a local one is mapped."""
    if is_url(file.path):
        with open_unchanged(file) as raw, arrow.PythonFile(raw, "r") as source:
            yield source
        return
    try:
        mapped = arrow.memory_map(file.path, "r")
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{file.path}: cannot be read ({error}); check the file and its permissions") from error
    with mapped as source:
        check_unchanged(file, source.size())
        yield source


def _batches(arrow: Any, source: Any, path: str) -> tuple[Any, Iterator[Any]]:
    """Return the schema of a file, and an iterator over its record batches."""
    with damage_is_user_error(path, "Arrow"):
        head = source.read(len(_FILE_MAGIC))
        source.seek(0)
        if head.startswith(_FEATHER_1_MAGIC):
            raise UserError(f"{path}: Feather of version 1, which is not read; write it again with pyarrow.feather")
        if head == _FILE_MAGIC:
            reader = arrow.ipc.open_file(source)
            return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
        reader = arrow.ipc.open_stream(source)
        return reader.schema, iter(reader)


def _slice_rows(batch: Any) -> int:
    """Return the number of rows to convert at once, of about ``_SLICE_BYTES``."""
    return min(_SLICE_ROWS, max(1, _SLICE_BYTES * batch.num_rows // max(batch.nbytes, 1)))
