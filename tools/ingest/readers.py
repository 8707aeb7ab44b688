"""Reading the texts of a span of an input file, one after another, in bounded memory except for single documents.

Every fault is either the document's (a malformed line: refused by ``file:line``, or counted and left out) or the file's
(a truncated archive: always refused).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import orjson
import zstandard

from ...engine.errors import UserError
from .inputs import Format
from .tasks import Span

UTF8_BOM = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 16  # one read may expand a thousandfold

_Lines = Generator[tuple[int, int, bytes], None, None]
"""For each line: an offset in the file, the line's number (from 1) counted from that offset, and its bytes."""


@dataclass(frozen=True)
class BadLine:
    """Where a malformed line is, and why. Finding its number may cost a pass over the file, so that is put off."""

    path: str
    reason: str
    offset: int
    """Byte offset in the file from which ``line`` is counted."""
    line: int
    """Number of the line after ``offset``, from 1."""

    def describe(self) -> str:
        """``file:line: reason``."""
        return f"{self.path}:{_count_newlines(self.path, self.offset) + self.line}: {self.reason}"


@dataclass
class SpanTally:
    """What was found in a span; reading updates it."""

    consumed: int = 0
    """Bytes on disk read so far."""
    documents: int = 0
    empty_documents: int = 0
    skipped_lines: int = 0
    first_skipped: BadLine | None = None


class _MalformedError(Exception):
    """Why a line or file is not a document; ``line`` counts from 0 within it."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


def read_texts(span: Span, json_key: str, skip_bad_lines: bool, tally: SpanTally) -> Iterator[str]:
    """The texts of ``span`` in order. Blank lines are nothing; a BOM at a file's start and CRLF line ends are accepted.

    Args:
        json_key: key of the text in a JSONL record.
        skip_bad_lines: count malformed lines (or .txt files) in ``tally`` and go on.

    Raises:
        UserError: a malformed line without ``skip_bad_lines``, or a damaged file.
    """
    read_lines = {Format.TXT: _whole_file, Format.JSONL: _plain_lines}.get(span.format, _compressed_lines)
    with closing(read_lines(span, tally)) as lines:
        for offset, number, content in lines:
            try:
                if span.format is Format.TXT:
                    yield _decode(content)
                elif content and not content.isspace():
                    yield _text_of_record(content, json_key)
            except _MalformedError as error:
                bad = BadLine(span.path, str(error), offset, number + error.line)
                if not skip_bad_lines:
                    raise UserError(
                        f"{bad.describe()}; mend it, or leave such lines out with --skip-bad-lines"
                    ) from None
                tally.skipped_lines += 1
                tally.first_skipped = tally.first_skipped or bad


def _text_of_record(line: bytes, key: str) -> str:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decode(line)  # which raises if that is the reason
        if "surrogate" in error.msg:
            reason = "an escaped lone surrogate, half a character, which is not text"
        else:
            reason = f"not valid JSON: {error.msg} at character {error.pos + 1} of the line"
        raise _MalformedError(reason) from None
    if type(record) is not dict:
        raise _MalformedError(f"{_json_type(record)}, not a JSON object")
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise _MalformedError(f"no key {key!r} (keys there: {keys}); name the text's key with --json-key")
    text = record[key]
    if type(text) is not str:
        raise _MalformedError(f"the value of {key!r} is {_json_type(text)}, not a string")
    return text


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        raise _MalformedError(
            f"not valid UTF-8: byte 0x{content[error.start]:02x} at byte {error.start - line_start + 1} of the line",
            line=content.count(b"\n", 0, error.start),
        ) from None


def _count_newlines(path: str, stop: int) -> int:
    """Line feeds in the first ``stop`` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, _BUFFER_BYTES))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _whole_file(span: Span, tally: SpanTally) -> _Lines:
    with open(span.path, "rb") as file:
        content = file.read()
    tally.consumed = span.stop
    yield 0, 1, content.removeprefix(UTF8_BOM)


def _plain_lines(span: Span, tally: SpanTally) -> _Lines:
    """Each line whose first byte lies in the span."""
    with open(span.path, "rb", buffering=_BUFFER_BYTES) as file:
        offset = span.start
        if offset > 0:
            # Up to the next line's start, which is here if the byte before ends a line.
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        for line in file:
            if offset >= span.stop:
                break
            start, offset = offset, offset + len(line)
            tally.consumed = min(offset, span.stop) - span.start
            yield start, 1, line.removeprefix(UTF8_BOM) if start == 0 else line


def _compressed_lines(span: Span, tally: SpanTally) -> _Lines:
    """Each line of a compressed file."""
    with open(span.path, "rb") as file:
        if span.stop == 0:
            raise UserError(f"{span.path}: an empty file, which no compressed file is; copy it again")
        raw = gzip.GzipFile(fileobj=file) if span.format is Format.JSONL_GZ else _ZstdFile(file)
        try:
            for number, line in enumerate(io.BufferedReader(raw, _BUFFER_BYTES), 1):
                tally.consumed = file.tell()
                yield 0, number, line.removeprefix(UTF8_BOM) if number == 1 else line
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{span.path}: truncated or damaged ({error}); copy or compress it again") from error


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a zstd file of any number of frames.

    ``zstandard.stream_reader`` ends quietly where a file is cut off; this raises EOFError.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._context = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._context.decompressobj()
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._decompress_more():
                return 0
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress_more(self) -> bool:
        """Decompress the next block of the file; false at its end."""
        block = self._input or self._file.read(_ZSTD_INPUT_BYTES)
        if not block:
            if not self._frame.eof:
                raise EOFError("the last zstd frame is not complete")
            return False
        if self._frame.eof:
            self._frame = self._context.decompressobj()
        self._output = memoryview(self._frame.decompress(block))
        self._input = self._frame.unused_data
        return True
