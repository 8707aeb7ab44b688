"""Opens input files as buffered, decompressed streams, and turns errors of files and libraries into one-line errors."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Protocol, TypeVar, cast

import zstandard

from ....engine.errors import UserError
from ..formats import FORMATS
from ..inputs.files import InputFile
from ..records.errors import DamagedError
from ..records.reading import ReadContext
from ..storage import open_file, short_reason
from .expansion_limit import READ_AHEAD_BYTES, ExpansionLimit

_GzipFile: Any = gzip.GzipFile
_DAMAGED: tuple[Any, ...] = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, zlib.error)
with suppress(ImportError):
    from isal import igzip, igzip_lib  # 3 times as fast

    _GzipFile = igzip.IGzipFile
    _DAMAGED += (igzip_lib.IsalError,)

_BUFFER_BYTES = 1 << 20
_ZSTD_MAX_WINDOW = 1 << 31
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE_BLOCK = 1
_END: Any = object()

_Item = TypeVar("_Item")


@contextmanager
def open_stream(file: InputFile, context: ReadContext) -> Iterator[io.BufferedReader[Any]]:
    """Open a file as :func:`open_unbuffered` does, with a buffer."""
    with open_unbuffered(file, context) as raw, io.BufferedReader(raw, _BUFFER_BYTES) as stream:
        yield stream


@contextmanager
def open_unbuffered(file: InputFile, context: ReadContext) -> Iterator[io.RawIOBase]:
    """Open a file as a decompressed stream; without compression it is seekable.

    ``context.consumed`` follows the position in the file on disk. Reading raises UserError if the file is damaged.

    Raises:
        UserError: the file does not exist anymore, has changed since planning, or is empty but compressed.
    """
    with open_unchanged(file) as raw:
        if file.compression and file.size == 0:
            raise DamagedError(f"{file.path}: an empty file, not a valid compressed file; copy it again")
        yield _CheckedStream(file, raw, context)


@contextmanager
def open_unchanged(file: InputFile) -> Iterator[io.RawIOBase]:
    """Open a file as it is stored. Raise UserError if it cannot be, or has changed since the tasks were planned."""
    try:
        raw = open_file(file.path, "stream" if FORMATS[file.format].compressible else "table")
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror})") from error
    with raw:
        check_unchanged(file, raw.seek(0, os.SEEK_END))
        raw.seek(0)
        yield raw


def check_unchanged(file: InputFile, size: int) -> None:
    """Raise UserError if a file has changed since the tasks were planned."""
    if size != file.size:
        raise UserError(
            f"{file.path}: was {file.size} bytes and is {size} now; start again when no program writes to it"
        )


class Peekable(Protocol):
    """The part of a buffered stream that :func:`skip_bom` uses."""

    def peek(self, size: int = 0, /) -> bytes:
        """Return the next bytes without moving."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next ``size`` bytes."""


def skip_bom(stream: Peekable, path: str) -> int:
    """Skip the byte order mark of UTF-8; return the number of skipped bytes. Raise UserError for that of UTF-16."""
    head = stream.peek(3)[:3]
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}: is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
    return len(stream.read(3)) if head == codecs.BOM_UTF8 else 0


@contextmanager
def damage_is_user_error(path: str, kind: str) -> Iterator[None]:
    """Turn any error of a library that reads files of this ``kind`` into a DamagedError."""
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise DamagedError(
            f"{path}: damaged, or too much in one piece: it needs more memory than is available ({short_reason(error)})"
        ) from error
    except Exception as error:
        raise DamagedError(
            f"{path}: truncated, damaged or not a valid {kind} file ({short_reason(error)}); copy or write it again"
        ) from error


def iterate_checked(items: Iterable[_Item], path: str, kind: str) -> Iterator[_Item]:
    """Yield the items of a library's iterator, under :func:`damage_is_user_error`."""
    iterator = iter(items)
    while True:
        with damage_is_user_error(path, kind):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item


class _CheckedStream(io.RawIOBase):
    """The decompressed bytes of a file; damage raises UserError, after everything before it has been read."""

    def __init__(self, file: InputFile, raw: io.RawIOBase, context: ReadContext) -> None:
        self._path, self._raw, self._context = file.path, raw, context
        self._bytes: Any = _decompressed(file.compression, raw) if file.compression else raw
        self._readinto: Callable[[memoryview], int | None] = (
            cast(Any, self._bytes).readinto1 if file.compression else cast(Any, raw).readinto
        )
        self._is_isal = file.compression == ".gz" and _GzipFile is not gzip.GzipFile
        self._expansion = ExpansionLimit(file.path, file.size, context.options.max_expansion)
        self._produced = 0
        self._damage: DamagedError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._bytes is self._raw

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._damage is not None:
            raise self._damage
        count, room = 0, memoryview(buffer)
        try:
            # A full buffer is less work, and lets callers peek. Filling it in steps keeps what precedes an error.
            while count < len(room) and (more := self._readinto(room[count:])):
                count += more
        except _DAMAGED as error:
            if self._is_isal and self._context.options.skip_damage:
                return self._retry_with_zlib(buffer, count)
            self._damage = self._damaged(error)
        except OSError as error:
            if error.errno is not None:
                raise UserError(f"{self._path}: cannot be read ({error.strerror or error})") from error
            self._damage = self._damaged(error)  # bz2 has no exception of its own
        self._context.consumed = consumed = self._raw.tell()
        if self._bytes is not self._raw:
            self._produced += count
            self._expansion.check(consumed, self._produced)
        if self._damage is not None and not count:
            raise self._damage
        return count

    def _retry_with_zlib(self, buffer: bytearray | memoryview, count: int) -> int:
        """Continue with the standard library: isal loses what it decompressed in a failing step.

        ``count`` bytes are already in ``buffer``.
        """
        self._raw.seek(0)
        self._is_isal = False
        self._bytes = gzip.GzipFile(fileobj=cast(IO[bytes], _SmallReads(self._raw)), mode="rb")
        self._readinto = self._bytes.readinto1
        left = self._produced + count
        try:
            while left and (block := self._bytes.read1(min(left, _BUFFER_BYTES))):
                left -= len(block)
        except _DAMAGED as error:
            self._damage = self._damaged(error)
        if count:
            self._produced += count
            return count
        return self.readinto(buffer)

    def _damaged(self, error: Exception) -> DamagedError:
        return DamagedError(f"{self._path}: truncated or damaged ({error}); copy or compress it again")


def _decompressed(compression: str, raw: io.RawIOBase) -> Any:
    """Return a reader of the decompressed bytes, with ``readinto``."""
    if compression == ".zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
        return decompressor.stream_reader(cast(IO[bytes], _ZstdFrames(raw)), read_across_frames=True)
    source = cast(IO[bytes], _SmallReads(raw))
    if compression == ".gz":
        return _GzipFile(fileobj=source, mode="rb")
    return bz2.BZ2File(source) if compression == ".bz2" else lzma.LZMAFile(source)


class _SmallReads(io.RawIOBase):
    """A file that returns few bytes per read, however many a decompressor asks for."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: bytearray | memoryview) -> int | None:  # type: ignore[override]
        return self._raw.readinto(memoryview(buffer)[:READ_AHEAD_BYTES])


class _ZstdFrames:
    """Reads the frames of a zstd file block by block (RFC 8878), to notice a truncated file.

    ``zstandard.stream_reader`` silently stops there, and the output of its ``decompressobj`` is not bounded.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._file = io.BufferedReader(raw, READ_AHEAD_BYTES)
        self._pieces = self._walk()

    def read(self, size: int = -1) -> bytes:
        """Return the next piece: a header, a block or a checksum."""
        return next(self._pieces, b"")

    def _walk(self) -> Iterator[bytes]:
        while magic := self._file.read(4):
            if magic != _ZSTD_MAGIC:
                self._skip_frame(magic)
                continue
            descriptor = self._exactly(1)
            flags = descriptor[0]
            single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
            window_bytes, dictionary_bytes = 1 - single_segment, (0, 1, 2, 4)[flags & 3]
            content_size_bytes = (single_segment, 2, 4, 8)[flags >> 6]
            yield magic + descriptor + self._exactly(window_bytes + dictionary_bytes + content_size_bytes)
            last = 0
            while not last:
                header = self._exactly(3)
                bits = int.from_bytes(header, "little")
                last, kind, size = bits & 1, bits >> 1 & 3, bits >> 3
                yield header + self._exactly(1 if kind == _RLE_BLOCK else size)
            if has_checksum:
                yield self._exactly(4)

    def _skip_frame(self, magic: bytes) -> None:
        """Skip a frame with data of other programs, such as the index of a seekable file."""
        if len(magic) == 4 and magic[0] & 0xF0 == 0x50 and magic[1:] == b"\x2a\x4d\x18":
            (left,) = struct.unpack("<I", self._exactly(4))
            while left:
                left -= len(self._exactly(min(left, _BUFFER_BYTES)))
        else:
            raise zstandard.ZstdError(f"no zstd frame begins with {magic!r}")

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("the last zstd frame is not complete")
        return data
