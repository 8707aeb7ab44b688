"""What is on disk and what it should be: sizes and hashes of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from .regular import open_regular

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file."""

    bytes: int
    xxh3_128: str
    """In hexadecimal, as of ``engine.data.sidecar.hash_file``."""


def record_file(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> FileRecord:
    """Read ``path`` for its record; ``on_bytes`` hears how many bytes each block had."""
    digest, size = xxhash.xxh3_128(), 0
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            on_bytes(len(block))
    return FileRecord(size, digest.hexdigest())
