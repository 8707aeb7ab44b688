"""Detects the format of a file by its first bytes, if its name is ambiguous or has no suffix.

``.json`` may be an array, one object, or an object per line; ``.jsonl`` and ``.txt`` sometimes contain another form of
JSON; part files of Spark have no suffix. At most a few MB are read. Encodings and CSV are not detected.
"""

from __future__ import annotations

import bz2
import codecs
import io
import lzma
import os
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import orjson
import zstandard

from ....engine.errors import UserError
from ..formats import split_compression
from ..storage import read_start

_HEAD_BYTES = 64 << 10
_LONG_HEAD_BYTES = 4 << 20
"""Read if the first ``_HEAD_BYTES`` contain no whole line, or nothing of a compressed file."""
_MAX_WINDOW = 1 << 27
_LINES = 8
_MAGIC = {b"\x1f\x8b\x08": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
_TABLES = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow", b"\xff\xff\xff\xff": "arrow", b"%PDF-": "pdf"}
_ARRAY_OF_JSON = re.compile(rb"\[\s*(?:\{\s*[\"}]|\[?\])")
AMBIGUOUS = ("jsonl", "json", "txt", "txt-lines")
"""Formats whose suffixes are used for others too."""


class Detected(NamedTuple):
    """Format and compression of a file."""

    format: str | None
    """Key of ``FORMATS``; None if unknown."""
    compression: str
    """A value of ``COMPRESSIONS``, or ""."""


def detect(
    path: str, named: str | None, compression: str, force: bool = False, keys: Sequence[str] | None = None
) -> Detected:
    """Return the format and the compression of a file.

    Args:
        named: the format by its name; None if unknown.
        compression: the compression by its name, or "", which is then detected.
        force: the user gave the format ``named``; detect only the compression.
        keys: of the texts, which distinguish lines of JSON in a .txt file from text that looks like JSON; None: any.

    Raises:
        UserError: the file cannot be read.
    """
    if not force and named is not None and named not in AMBIGUOUS:
        return Detected(named, compression)
    head = _first_bytes(path, _HEAD_BYTES)
    if not compression:
        compression = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    if force:
        return Detected(named, compression)
    content = _decompressed(head, compression)
    if len(head) == _HEAD_BYTES and (b"\n" not in content) and (not content or content.lstrip()[:1] in (b"{", b"[")):
        content = _decompressed(_first_bytes(path, _LONG_HEAD_BYTES), compression)
    if table := next((name for magic, name in _TABLES.items() if content.startswith(magic)), None):
        return Detected(table, compression)
    return Detected(_json_shape(content, named, keys) or named, compression)


def _json_shape(content: bytes, named: str | None, keys: Sequence[str] | None) -> str | None:
    """Return "jsonl" or "json" if the text clearly is, else None."""
    content = content.removeprefix(codecs.BOM_UTF8).lstrip()
    is_text = named is not None and named.startswith("txt")
    first, _, rest = content.partition(b"\n")
    if content.startswith(b"{"):
        if named == "json":
            # If all lines begin as objects, one valid line is enough: bad ones must not hide the others.
            begun = [line.lstrip() for line in content.split(b"\n")[:_LINES] if line.strip()]
            if not _is_json(first, dict):
                is_lines = all(line.startswith(b"{") for line in begun) and any(_is_json(line, dict) for line in begun)
            else:
                is_lines = rest.lstrip().startswith(b"{")
            return "jsonl" if is_lines and len(begun) > 1 else None
        if first.strip() == b"{" and not is_text:
            return "json"
        lines = [line for line in content.splitlines(keepends=True)[:_LINES] if line.strip()]
        if len(lines) > 1 and not lines[-1].endswith(b"\n"):
            lines.pop()  # cut off, perhaps
        return "jsonl" if all(_is_json(line, dict, keys if is_text else None) for line in lines) else None
    if named != "json" and _ARRAY_OF_JSON.match(content):
        if is_text and keys is not None and not any(f'"{key}"'.encode() in content for key in keys):
            return None
        return None if _is_json(first, list) and rest.strip() else "json"
    return None


def _is_json(line: bytes, kind: type, keys: Sequence[str] | None = None) -> bool:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, kind) and (keys is None or any(f'"{key}"'.encode() in line for key in keys))


def _first_bytes(path: str, size: int) -> bytes:
    try:
        return read_start(path, size)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from error


def _decompressed(head: bytes, compression: str) -> bytes:
    """Return the beginning of the decompressed ``head``; empty if damaged, which the reader reports."""
    try:
        if compression == ".gz":
            return zlib.decompressobj(wbits=31).decompress(head, _LONG_HEAD_BYTES)
        if compression == ".bz2":
            return bz2.BZ2Decompressor().decompress(head, _LONG_HEAD_BYTES)
        if compression == ".xz":
            return lzma.LZMADecompressor().decompress(head, _LONG_HEAD_BYTES)
        if compression == ".zst":
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
            with decompressor.stream_reader(io.BytesIO(head), read_across_frames=True) as stream:
                return stream.read(_LONG_HEAD_BYTES)
    except (zlib.error, EOFError, OSError, lzma.LZMAError, zstandard.ZstdError):
        return b""
    return head


def has_no_suffix(path: str) -> bool:
    """Return whether a file's name does not show its format, such as ``part-00000`` and ``part-00000.gz``."""
    return "." not in split_compression(os.path.basename(path).lower())[0]
