"""Checkpoint files hashed while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

from .hashing import FileRecord


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer, which flushes every file to disk and keeps the :attr:`records` of those that this rank writes.

    What is hashed is what was to be written: a disk that keeps something else is found out when it is read again.
    """

    def __init__(self, folder: Path, from_host: bool):
        # Where there is a GPU, DCP would wait for its queue every so many bytes, even with values on the host.
        ahead = 0 if from_host else 10_000_000
        super().__init__(str(folder), single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=ahead)
        self.records: dict[str, FileRecord] = {}
        self.fs = _HashingFileSystem(self.records)


class _HashingFileSystem(FileSystem):
    def __init__(self, records: dict[str, FileRecord]) -> None:
        self.records = records

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashed = _HashedStream(stream)
            yield hashed
        self.records[Path(path).name] = hashed.record()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashedStream:
    """As much of a file as DCP, torch.save and pickle write through: from its beginning to its end, never back."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._digest, self._size = xxhash.xxh3_128(), 0
        self.flush, self.fileno, self.tell, self.close = stream.flush, stream.fileno, stream.tell, stream.close

    def write(self, data: Any) -> int:
        self._digest.update(data)
        count = self._stream.write(data)
        self._size += count
        return cast(int, count)

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._digest.hexdigest())
