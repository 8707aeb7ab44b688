"""Hash files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from .regular import open_regular

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file."""

    bytes: int
    xxh3_128: str
    """In hexadecimal."""


def record_file(path: str | os.PathLike[str], on_bytes: Callable[[int], object] = lambda count: None) -> FileRecord:
    """Return size and hash of the file ``path``; ``on_bytes`` is called with the number of bytes of each block.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            on_bytes(len(block))
    return FileRecord(size, digest.hexdigest())


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the xxh3_128 of the file ``path``, in hexadecimal."""
    return record_file(path).xxh3_128
