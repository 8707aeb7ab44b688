"""Copy tensors from a source into files, one block at a time, and hash every tensor on both sides.

Both output formats, safetensors and the files of DCP, hold the values of tensors at known places. The few other bytes
depend only on names and shapes. So a file is created without its values, and the values are written directly to their
places. Then the file is read back from the disk and compared with the source.

Memory: each worker holds one block, and the cast block if there is a cast, whatever the size of a tensor. A block is
:data:`BLOCK_BYTES` of source, and a cast block has as many elements of target.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from ..errors import UserError
from ..files.hashing import FileRecord
from .finite import REMEDY, all_finite, require_finite
from .raw_bytes import bytes_of, write_exactly
from .tensor_source import ReadRows, StoredTensor, TensorSource, rows_of
from .workers import WorkerStopped

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class OutputFile:
    """The layout of a file of tensors."""

    name: str
    tensors: Mapping[str, StoredTensor]
    """The tensors as stored, in the order of their places."""
    begin: Callable[[Path], dict[str, int]]
    """Creates the complete file except for the values, and returns the offset of every tensor in it. May raise
    OSError."""

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Hashes:
    """The xxh3_128 of one tensor's bytes, in hexadecimal."""

    source: str
    """Hash of the bytes as read, in the dtype of the source."""
    written: str
    """Hash of the bytes as stored. The same if nothing was cast."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that has been read back from the disk and verified."""

    name: str
    record: FileRecord
    tensors: dict[str, Hashes]


def copy_files(
    folder: Path,
    files: Sequence[OutputFile],
    source: TensorSource,
    workers: int = 1,
    hashed_rows: Mapping[str, int] | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    on_file: Callable[[WrittenFile], object] = lambda file: None,
    nonfinite_remedy: str | None = REMEDY,
) -> dict[str, WrittenFile]:
    """Write ``files`` into ``folder``, each with the tensors of ``source``, cast to the requested dtypes.

    Args:
        folder: the folder to write to.
        files: the files to write.
        source: has every tensor in the requested shape.
        workers: threads; each copies one tensor at a time.
        hashed_rows: number of rows that come from the source, for tensors with additional last rows. All rows, if not
            named.
        on_bytes: called with the number of bytes written or read back, by one thread at a time.
        on_file: called with every file that is complete, flushed to disk and read back, by one thread at a time.
        nonfinite_remedy: remedy in an error about NaN and infinite values of the source; None copies them.

    Returns:
        The files by name.

    Raises:
        UserError: a source cannot be read or has non-finite values, a value overflows in the requested dtype, or the
            disk returns other bytes than were written.
        OSError: a file cannot be written.
    """
    job = _Job(source, hashed_rows or {}, on_bytes, on_file, nonfinite_remedy)
    # The largest first, so that no worker has to process a large one alone at the end.
    by_size = sorted(files, key=lambda file: -file.num_bytes)
    states = [_FileState(file, folder / file.name, len(file.tensors)) for file in by_size]
    try:
        with _one_torch_thread(), ThreadPoolExecutor(max(1, workers), "copy", torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(job.copy, state, name) for state in states for name in state.file.tensors]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failures = [future.exception() for future in futures if future.done() and not future.cancelled()]
            finally:  # also after Ctrl-C: threads must end before the folder is inspected or a file is closed
                job.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        for state in states:
            state.close()
    for failure in failures:
        if failure is not None and not isinstance(failure, WorkerStopped):
            raise failure
    return {file.name: job.written[file.name] for file in files}


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Casts run in the workers' own threads; PyTorch would start additional threads in each."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _FileState:
    file: OutputFile
    path: Path
    num_left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    descriptor: int | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, Hashes] = field(default_factory=dict)

    def open(self) -> tuple[int, dict[str, int]]:
        """Begin the file if this is the first of its tensors."""
        with self.lock:
            if self.descriptor is None:
                self.path.unlink(missing_ok=True)
                self.offsets = self.file.begin(self.path)
                self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            return self.descriptor, self.offsets

    def complete(self, name: str, hashes: Hashes) -> bool:
        """Record a finished tensor; return whether it was the last one, after flushing the file to disk and closing
        it.
        """
        with self.lock:
            self.hashes[name] = hashes
            self.num_left -= 1
            if self.num_left:
                return False
            assert self.descriptor is not None
            os.fsync(self.descriptor)
        self.close()
        return True

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class _Buffers(threading.local):
    """Memory of one worker, reused for every block: freed blocks of many sizes would fragment the heap."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor in the memory of the last one for the same ``use``."""
        num_bytes = math.prod(shape) * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.numel() < num_bytes:
            held = self._held[use] = torch.empty(max(num_bytes, BLOCK_BYTES), dtype=torch.uint8)
        return held[:num_bytes].view(dtype).view(tuple(shape))


class _Job:
    def __init__(
        self,
        source: TensorSource,
        hashed_rows: Mapping[str, int],
        on_bytes: Callable[[int], object],
        on_file: Callable[[WrittenFile], object],
        nonfinite_remedy: str | None,
    ):
        self.source = source
        self.hashed_rows = hashed_rows
        self.stop = threading.Event()
        self.written: dict[str, WrittenFile] = {}
        self._buffers = _Buffers()
        self._report = threading.Lock()
        self._on_bytes = on_bytes
        self._on_file = on_file
        self._nonfinite_remedy = nonfinite_remedy

    def advance(self, count: int) -> None:
        if self.stop.is_set():
            raise WorkerStopped
        with self._report:
            self._on_bytes(count)

    def copy(self, state: _FileState, name: str) -> None:
        """Copy one tensor; the last one of a file also verifies the file."""
        if self.stop.is_set():
            raise WorkerStopped
        descriptor, offsets = state.open()
        with self.source.rows(name) as read:
            hashes = self._copy_tensor(read, name, state.file.tensors[name], descriptor, offsets[name])
        if not state.complete(name, hashes):
            return
        record, found = read_back(state.path, state.file.tensors, offsets, self.advance)
        for tensor, of_tensor in state.hashes.items():
            if found[tensor] != of_tensor.written:
                raise UserError(
                    f"{state.path}: reading {tensor} back gives other values than were written (xxh3_128 "
                    f"{found[tensor]} instead of {of_tensor.written}); write to another disk"
                )
        done = WrittenFile(state.file.name, record, {key: state.hashes[key] for key in state.file.tensors})
        with self._report:
            self._on_file(done)
            self.written[done.name] = done

    def _copy_tensor(self, read: ReadRows, name: str, target: StoredTensor, descriptor: int, offset: int) -> Hashes:
        source = self.source.tensors[name]
        assert source.shape == target.shape, name
        num_rows, *rest = rows_of(source.shape)
        row_bytes = math.prod(rest) * source.dtype.itemsize
        block_rows = max(1, min(num_rows, BLOCK_BYTES // max(1, row_bytes)))
        block = self._buffers.take("block", (block_rows, *rest), source.dtype)
        cast = block if target.dtype == source.dtype else self._buffers.take("cast", block.shape, target.dtype)
        source_hash, written_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
        hashed_rows = self.hashed_rows.get(name, num_rows)
        for first in range(0, num_rows, block_rows):
            rows = block[: min(block_rows, num_rows - first)]
            read(first, rows)
            source_hash.update(bytes_of(rows[: max(0, hashed_rows - first)]))
            out = cast[: rows.shape[0]]
            if cast is not block:
                out.copy_(rows)
            if not all_finite(out):
                if self._nonfinite_remedy is not None:
                    require_finite(name, rows, self._nonfinite_remedy)
                _require_range(name, rows, out)
            data = bytes_of(out)
            written_hash.update(data)
            write_exactly(descriptor, offset, data)
            offset += len(data)
            self.advance(len(data))
        return Hashes(source_hash.hexdigest(), written_hash.hexdigest())


def _require_range(name: str, rows: torch.Tensor, cast: torch.Tensor) -> None:
    """Refuse a cast that has made finite values infinite."""
    lost = rows[~cast.isfinite() & rows.isfinite()]
    if not lost.numel():  # they were infinite or NaN before
        return
    dtype = str(cast.dtype).removeprefix("torch.")
    raise UserError(
        f"{name}: values up to {float(lost.abs().max()):.4g} become infinite in {dtype}, whose maximum is "
        f"{torch.finfo(cast.dtype).max:.4g}; choose --dtype float32, or keep the original dtype"
    )


def read_back(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    offsets: Mapping[str, int],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> tuple[FileRecord, dict[str, str]]:
    """Read the file ``path`` back from the disk, after dropping it from the page cache if possible.

    Returns:
        Its size and hash, and the xxh3_128 of every tensor, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    whole, size, found = xxhash.xxh3_128(), 0, {}
    places = sorted((offsets[name], offsets[name] + tensor.num_bytes, name) for name, tensor in tensors.items())
    with open(path, "rb", buffering=0) as file:
        # The cache drops only flushed pages; the caller has flushed them.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        end = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(1, end))))

        def read_until(stop: int, *digests: xxhash.xxh3_128) -> None:
            nonlocal size
            while size < stop:
                count = file.readinto(buffer[: stop - size])
                if not count:
                    return
                for digest in digests:
                    digest.update(buffer[:count])
                size += count
                on_bytes(count)

        for start, stop, name in places:
            digest = xxhash.xxh3_128()
            read_until(start, whole)
            read_until(stop, whole, digest)
            found[name] = digest.hexdigest()
        read_until(end, whole)
    return FileRecord(size, whole.hexdigest()), found
