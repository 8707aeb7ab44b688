"""``.json`` files: an array of objects or strings, or one object after another; each is a record.

The file is split into values without parsing, and each value is parsed like a line of JSONL. Memory holds one value, or
the beginning of a long one. Files with an object on each line are usually read as JSONL (see ``detection.py``), which
can continue after a malformed line. Objects that wrap an array, such as {"data": [...]}, are not unwrapped, because
conversations look the same; ``jq -c '.data[]' corpus.json > corpus.jsonl`` converts them.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..records.errors import DamagedError, MalformedError, Where
from ..records.json_values import WantedKeys
from ..records.long_text import LONG_BYTES, LongText
from ..records.reading import ReadContext, Record
from ..records.text_choice import json_type
from ..workers.tasks import Span
from .lines import MAX_RECORD_BYTES, RawRecord, parse_value
from .streams import open_stream, skip_bom

_READ_BYTES = 1 << 20
_SHOWN_BYTES = 1024  # of a long element that is refused
_SPACE = re.compile(rb"[ \t\r\n]*")
_BACKSLASH = 0x5C
_MARK = re.compile(rb'[\[\]{}",]')
_MARK_INSIDE = re.compile(rb'[\[\]{}"]')


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the elements of the array, or the objects."""
    path, keys = span.file.path, WantedKeys(context.columns or ())
    with open_stream(span.file, context) as stream:
        skip_bom(stream, path)
        values = _JsonSplitter(stream, context.scratch, path)
        first = values.next_byte()
        if first == b"[":
            yield from _elements(values, path, keys, context)
        elif first == b"{":
            yield from _objects(values, path, keys, context)
        else:
            found = f"begins with {first.decode('latin-1')!r}" if first else "an empty file"
            context.refuse(Where(path), f"{found}, not a JSON array of objects", "malformed", None)


def _elements(values: _JsonSplitter, path: str, keys: WantedKeys, context: ReadContext) -> Iterator[Record]:
    values.skip_byte()
    number = 0
    after = b"]" if values.next_byte() == b"]" else b","
    while after == b",":
        number += 1
        where = Where(path, "element", number)
        with values.value() as (content, long):
            after = values.next_byte()
            if after not in (b",", b"]"):
                wrong = "ends there: truncated" if not after else "has a '}' too many"
                raise DamagedError(
                    f"{where.describe()}: the JSON array {wrong}, or a quote or bracket is missing before"
                )
            values.skip_byte()
            yield from _parsed(RawRecord(where, content, long), keys, context)
    if number == 0:
        values.skip_byte()
    if values.next_byte():
        raise DamagedError(
            f"{path}: has content after the end of the JSON array; write one array, or a record on each line"
        )


def _objects(values: _JsonSplitter, path: str, keys: WantedKeys, context: ReadContext) -> Iterator[Record]:
    """Yield objects one after another, in any layout: a single one, lines, or the output of ``jq``."""
    number = 0
    while (first := values.next_byte()) == b"{":
        number += 1
        with values.value(closed=True) as (content, long):
            where = Where(path) if number == 1 and not values.next_byte() else Where(path, "object", number)
            yield from _parsed(RawRecord(where, content, long), keys, context)
    if first:
        raise DamagedError(f"{path}: has content after the end of JSON object {number}, which is not another object")


def _parsed(element: RawRecord, keys: WantedKeys, context: ReadContext) -> Iterator[Record]:
    value: dict[str, Any] | str | LongText
    try:
        value = parse_value(element, keys)
        if not isinstance(value, (dict, str, LongText)):
            raise MalformedError(f"{json_type(value)}, not a JSON object or string")
    except MalformedError as error:
        # The parsers' messages refer to lines.
        context.refuse(element.where, str(error).removesuffix(" of the line"), error.kind, bytes(element.content))
    else:
        yield Record(value, element.where)


class _JsonSplitter:
    """Splits a JSON text into values."""

    def __init__(self, stream: io.BufferedReader[Any], scratch: Path, path: str) -> None:
        self._stream, self._scratch, self._path = stream, scratch, path
        self._buffer = bytearray()

    def next_byte(self) -> bytes:
        """Peek at the next byte that is not white space; empty at the end."""
        while True:
            del self._buffer[: len(_SPACE.match(self._buffer)[0])]  # type: ignore[index]
            if self._buffer or not self._fill():
                return bytes(self._buffer[:1])

    def skip_byte(self) -> None:
        """Skip the byte that :meth:`next_byte` returned."""
        del self._buffer[:1]

    @contextmanager
    def value(self, closed: bool = False) -> Iterator[tuple[bytes, Path | None]]:
        """Return the value up to the comma or bracket after it, or with ``closed`` up to its own last bracket.

        For more than ``LONG_BYTES``: its beginning, and a temporary file with all of it.
        """
        ends = _EndOfValue(closed)
        with ExitStack() as stack:
            copy, beginning = None, b""
            while (end := ends.find(self._buffer)) is None:
                if len(self._buffer) > LONG_BYTES:
                    if copy is None:
                        copy = stack.enter_context(tempfile.NamedTemporaryFile(dir=self._scratch, prefix="element."))
                        beginning = bytes(self._buffer[:_SHOWN_BYTES])
                    copy.write(self._buffer[: ends.position])
                    if copy.tell() > MAX_RECORD_BYTES:
                        raise DamagedError(
                            f"{self._path}: a JSON value of more than {MAX_RECORD_BYTES >> 30} GiB; split it"
                        )
                    del self._buffer[: ends.position]
                    ends.position = 0
                if not self._fill():
                    end = len(self._buffer)
                    break
            content = bytes(self._buffer[:end])
            del self._buffer[:end]
            if copy is None:
                yield content, None
            else:
                copy.write(content)
                copy.flush()
                yield beginning, Path(copy.name)

    def _fill(self) -> bool:
        block = self._stream.read1(_READ_BYTES)
        self._buffer += block
        return bool(block)


class _EndOfValue:
    """Finds the end of a JSON value by its brackets and quotes, in a buffer that grows between calls."""

    def __init__(self, closed: bool) -> None:
        self.position = 0
        """The buffer is searched up to here; the caller subtracts what it takes from the buffer's front."""
        self._closed = closed
        self._depth = 0
        self._in_string = False

    def find(self, buffer: bytearray) -> int | None:
        """Return where the value ends; None if it is not in the buffer yet."""
        while True:
            if self._in_string:
                if not self._leave_string(buffer):
                    return None
                continue
            mark = (_MARK_INSIDE if self._depth or self._closed else _MARK).search(buffer, self.position)
            if mark is None:
                self.position = len(buffer)
                return None
            self.position = mark.end()
            byte = mark[0]
            if byte == b'"':
                self._in_string = True
            elif byte in b"[{":
                self._depth += 1
            elif self._depth == 0:
                return mark.start()
            else:
                self._depth -= 1
                if self._closed and self._depth == 0:
                    return mark.end()

    def _leave_string(self, buffer: bytearray) -> bool:
        """Continue after the next quote; return False if there is none yet."""
        quote = buffer.find(b'"', self.position)
        stop = quote if quote >= 0 else len(buffer)
        escaped = False
        if stop > self.position and buffer[stop - 1] == _BACKSLASH:
            searched = buffer[self.position : stop]
            escaped = (len(searched) - len(searched.rstrip(b"\\"))) % 2 == 1
        if quote < 0:
            self.position = stop - escaped
            return False
        self.position = quote + 1
        self._in_string = escaped
        return True
