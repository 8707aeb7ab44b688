"""Files whose lines are records: JSONL, and text of which each line is a document.

Blank lines are nothing; a BOM at a file's start and CRLF line ends are accepted. A line belongs to the span in which
its first byte lies.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from ..long_text import LONG_BYTES, LongText, bad_json, invalid_utf8, read_long_json
from ..records import MalformedError, ReadContext, Record, Where
from ..tasks import Span
from ..texts import TextChoice, json_type
from .streams import open_stream

UTF8_BOM = b"\xef\xbb\xbf"
_COPY_BYTES = 1 << 20
_SHOWN_BYTES = 1024  # of a long line, where it is refused


class _Line(NamedTuple):
    where: Where
    content: bytes
    """Without a BOM; the beginning only when ``long`` is set."""
    long: Path | None
    """A file that holds the whole of a line of more than ``LONG_BYTES``."""


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The records of ``span``: an object for each line of JSON, a text for each line of text."""
    is_json = span.file.format == "jsonl"
    with closing(_lines(span, context)) as lines:
        for line in lines:
            try:
                value = _parse_json(line, context.columns or ()) if is_json else _parse_text(line)
            except MalformedError as error:
                context.refuse(line.where, str(error), error.kind, line.content)
                continue
            yield Record(value, line.where)


def read_texts(span: Span, context: ReadContext, key: str) -> Iterator[str | LongText]:
    """The strings under ``key`` of the objects of ``span``: what most corpora are, at less cost than :func:`read`."""
    name = orjson.dumps(key)
    with closing(_lines(span, context)) as lines:
        for line in lines:
            try:
                record = orjson.loads(line.content) if line.long is None else read_long_json(line.long)
                text = record[key]
                if (type(text) is str or type(text) is LongText) and line.content.count(name) == 1:
                    yield text
                    continue
            except (orjson.JSONDecodeError, KeyError, TypeError, MalformedError):
                pass
            try:
                yield TextChoice((key,)).text(_parse_json(line, (key,)))
            except MalformedError as error:
                context.refuse(line.where, str(error), error.kind, line.content)


def _parse_json(line: _Line, keys: Sequence[str]) -> dict[str, Any]:
    """The object in ``line``, in which each of ``keys`` stands at most once."""
    if line.long is not None:
        record = read_long_json(line.long)
    else:
        try:
            record = orjson.loads(line.content)
        except orjson.JSONDecodeError as error:
            raise bad_json(line.content, error) from None
    if type(record) is not dict:
        raise MalformedError(f"{json_type(record)}, not a JSON object")
    if line.long is None:
        for key in keys:
            if line.content.count(orjson.dumps(key)) > 1:
                _refuse_repeated(key, line.content)
    return record


def _refuse_repeated(key: str, content: bytes) -> None:
    """Raise when an object of ``content`` has ``key`` twice: parsers keep the one or the other."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        if sum(name == key for name, _ in pairs) > 1:
            raise MalformedError(f"the key {key!r} twice in one object")

    json.loads(content, object_pairs_hook=check)


def _parse_text(line: _Line) -> str | LongText:
    if line.long is not None:
        return LongText(str(line.long), 0, line.long.stat().st_size, is_json=False)
    try:
        return line.content.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(line.content, error) from None


def _lines(span: Span, context: ReadContext) -> Iterator[_Line]:
    """Each line whose first byte lies in the span, blank ones left out."""
    path, plain = span.file.path, not span.file.compression
    with open_stream(span.file, context) as file:
        offset = span.start
        if offset > 0:
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
            first = offset == 0 if plain else number == 1
            size = len(content)
            if first:
                content = content.removeprefix(UTF8_BOM)
            if size == LONG_BYTES and not content.endswith(b"\n"):
                with _copied(content, file, context.scratch) as (copy, rest):
                    size += rest
                    yield _Line(where, content[:_SHOWN_BYTES], copy)
            elif content and not content.isspace():
                yield _Line(where, content, None)
            offset += size
            if plain:
                context.consumed = min(offset, span.stop) - span.start


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
def _copied(beginning: bytes, file: BinaryIO, folder: Path) -> Iterator[tuple[Path, int]]:
    """A temporary file with the line that starts with ``beginning`` and goes on in ``file``, and the size of the rest."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="line.") as copy:
        copy.write(beginning)
        rest = 0
        while part := file.readline(_COPY_BYTES):
            rest += len(part)
            copy.write(part.rstrip(b"\r\n") if part.endswith(b"\n") else part)
            if part.endswith(b"\n"):
                break
        copy.flush()
        yield Path(copy.name), rest
