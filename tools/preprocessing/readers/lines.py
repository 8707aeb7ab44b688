"""Files whose lines are records: JSONL, and text with a document per line.

Blank lines are skipped; a BOM and CRLF line ends are accepted. A line belongs to the span that contains its first byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..records.errors import DamagedError, MalformedError, Where
from ..records.json_values import WantedKeys, invalid_utf8, parse_json
from ..records.long_text import LONG_BYTES, LongText, read_long_json
from ..records.reading import ReadContext, Record
from ..records.text_choice import json_type
from ..workers.tasks import Span
from .line_buffer import LineBuffer
from .streams import open_unbuffered, skip_bom

_COPY_BYTES = 1 << 20
_SHOWN_BYTES = 1024  # of a long line that is refused
MAX_RECORD_BYTES = 2 << 30
"""Longer lines and values are refused: they would be copied to a temporary file."""
_TAIL_BYTES = 4096
_LINE_FEED, _SPACE = 0x0A, 0x20


class RawRecord(NamedTuple):
    """A line, or another part of a file that is a record."""

    where: Where
    content: bytes | memoryview
    """Only the beginning if ``long`` is set. A view is valid until the next record is read."""
    long: Path | None
    """File with a whole line of more than ``LONG_BYTES``, without its line end."""


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the records of ``span``: an object per line of JSON, a text per line of text."""
    is_json = span.file.format == "jsonl"
    keys = WantedKeys(context.columns or ())
    with closing(_lines(span, context)) as lines:
        for line in lines:
            try:
                value = parse_line(line, keys) if is_json else _text(line)
            except MalformedError as error:
                context.refuse(line.where, str(error), error.kind, bytes(line.content))
                continue
            yield Record(value, line.where, line.content)


def parse_line(line: RawRecord, keys: WantedKeys) -> dict[str, Any]:
    """Return the JSON object in ``line``. Raise MalformedError if it is not one, or has one of ``keys`` twice."""
    value = parse_value(line, keys)
    if type(value) is not dict:
        raise MalformedError(f"{json_type(value)}, not a JSON object")
    return value


def parse_value(line: RawRecord, keys: WantedKeys) -> Any:
    """Return the JSON value in ``line``. Raise MalformedError if invalid, or an object with one of ``keys`` twice."""
    return parse_json(line.content, keys) if line.long is None else read_long_json(line.long, keys, line.where)


def _text(line: RawRecord) -> str | LongText:
    if line.long is not None:
        return LongText(str(line.long), 0, line.long.stat().st_size, False, line.where).check()
    content = bytes(line.content)
    try:
        return content.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(content, error) from None


def _lines(span: Span, context: ReadContext) -> Generator[RawRecord, None, None]:
    """Yield each line whose first byte is in the span, except blank lines."""
    path, plain = span.file.path, not span.file.compression
    with open_unbuffered(span.file, context) as stream:
        file = LineBuffer(stream)
        offset, bom = span.start, 0
        if offset == 0:
            bom = skip_bom(file, path)
        else:
            # Skip to the start of a line, which is here if the byte before ends a line.
            file.seek(offset - 1)
            offset += _skip_line(file, span.stop - offset + 1) - 1
        number = 0
        while not plain or offset < span.stop:
            content = file.readline(LONG_BYTES)
            if not content:
                return
            number += 1
            where = Where(path, "line", 1, offset) if plain else Where(path, "line", number)
            offset += bom + len(content)
            bom = 0
            if plain:
                context.consumed = min(offset, span.stop) - span.start
            if len(content) == LONG_BYTES and content[-1] != _LINE_FEED:
                beginning = bytes(content[:_SHOWN_BYTES])
                with _copied(content, file, context.scratch, where) as (copy, rest):
                    offset += rest
                    if plain:
                        context.consumed = min(offset, span.stop) - span.start
                    yield RawRecord(where, beginning, copy)
            elif content[0] > _SPACE or not bytes(content).isspace():
                yield RawRecord(where, content, None)


def _skip_line(file: LineBuffer, limit: int) -> int:
    """Read to the end of a line, or at least ``limit`` bytes; return the number of bytes read."""
    skipped = 0
    while skipped < limit:
        part = file.readline(_COPY_BYTES)
        skipped += len(part)
        if not part or part[-1] == _LINE_FEED:
            break
    return skipped


@contextmanager
def _copied(beginning: memoryview, file: LineBuffer, folder: Path, where: Where) -> Iterator[tuple[Path, int]]:
    """Copy the line of ``beginning`` and its rest in ``file`` to a temporary file; return it and the rest's size."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="line.") as copy:
        copy.write(beginning)
        rest = 0
        while part := file.readline(_COPY_BYTES):
            rest += len(part)
            copy.write(part)
            if rest > MAX_RECORD_BYTES:
                raise DamagedError(
                    f"{where.describe()}: a line of more than {MAX_RECORD_BYTES >> 30} GiB; is it JSONL? split it"
                )
            if part[-1] == _LINE_FEED:
                break
        _drop_line_end(copy)
        copy.flush()
        yield Path(copy.name), rest


def _drop_line_end(file: IO[bytes]) -> None:
    size = file.tell()
    kept = b""
    while size and not kept:
        start = max(size - _TAIL_BYTES, 0)
        file.seek(start)
        kept = file.read(size - start).rstrip(b"\r\n")
        size = start + len(kept)
    file.truncate(size)
