"""Files whose lines are records: JSONL, and text of which each line is a document.

Blank lines are nothing; a BOM at a file's start and CRLF line ends are accepted. A line belongs to the span in which
its first byte lies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from ..records.errors import DamagedError, MalformedError, Where
from ..records.json_values import WantedKeys, invalid_utf8, parse_json
from ..records.long_text import LONG_BYTES, LongText, read_long_json
from ..records.reading import ReadContext, Record
from ..records.text_choice import json_type
from ..workers.tasks import Span
from .streams import open_stream, skip_bom

_COPY_BYTES = 1 << 20
_SHOWN_BYTES = 1024  # of a long line, where it is refused
MAX_RECORD_BYTES = 2 << 30
"""A longer line or value is no document: it would be copied to a temporary file as a whole."""
_TAIL_BYTES = 4096


class Line(NamedTuple):
    """A line, or another part of a file that is a record by itself."""

    where: Where
    content: bytes
    """The beginning only when ``long`` is set."""
    long: Path | None
    """A file that holds the whole of a line of more than ``LONG_BYTES``, without its end."""


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The records of ``span``: an object for each line of JSON, a text for each line of text."""
    is_json = span.file.format == "jsonl"
    keys = WantedKeys(context.columns or ())
    with closing(_lines(span, context)) as lines:
        for line in lines:
            try:
                value = parse_line(line, keys) if is_json else _text(line)
            except MalformedError as error:
                context.refuse(line.where, str(error), error.kind, line.content)
                continue
            yield Record(value, line.where, line.content)


def parse_line(line: Line, keys: WantedKeys) -> dict[str, Any]:
    """The JSON object in ``line``.

    Raises:
        MalformedError: it is none, or has one of ``keys`` twice.
    """
    value = parse_value(line, keys)
    if type(value) is not dict:
        raise MalformedError(f"{json_type(value)}, not a JSON object")
    return value


def parse_value(line: Line, keys: WantedKeys) -> Any:
    """The JSON value in ``line``, of any type.

    Raises:
        MalformedError: it is none, or an object that has one of ``keys`` twice.
    """
    return parse_json(line.content, keys) if line.long is None else read_long_json(line.long, keys, line.where)


def _text(line: Line) -> str | LongText:
    if line.long is not None:
        return LongText(str(line.long), 0, line.long.stat().st_size, False, line.where).check()
    try:
        return line.content.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(line.content, error) from None


def _lines(span: Span, context: ReadContext) -> Generator[Line, None, None]:
    """Each line whose first byte lies in the span, blank ones left out."""
    path, plain = span.file.path, not span.file.compression
    with open_stream(span.file, context) as file:
        offset, bom = span.start, 0
        if offset == 0:
            bom = skip_bom(file, path)
        else:
            # Up to the next line's start, which is here if the byte before ends a line.
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
            if len(content) == LONG_BYTES and not content.endswith(b"\n"):
                with _copied(content, file, context.scratch, where) as (copy, rest):
                    offset += rest
                    if plain:
                        context.consumed = min(offset, span.stop) - span.start
                    yield Line(where, content[:_SHOWN_BYTES], copy)
            elif not content.isspace():
                yield Line(where, content, None)


def _skip_line(file: BinaryIO, limit: int) -> int:
    """Read to the end of a line, or ``limit`` bytes at least; the number of bytes read."""
    skipped = 0
    while skipped < limit:
        part = file.readline(_COPY_BYTES)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped


@contextmanager
def _copied(beginning: bytes, file: BinaryIO, folder: Path, where: Where) -> Iterator[tuple[Path, int]]:
    """A temporary file with the line that begins so and goes on in ``file``, and how many bytes of it were there."""
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
            if part.endswith(b"\n"):
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
