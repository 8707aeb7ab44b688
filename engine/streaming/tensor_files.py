"""Read and write single tensors in DCP's own files, in parts.

DCP itself reads and writes whole tensors, and holds the largest one in memory two or three times. Its files are zip
archives as written by ``torch.save``, one per tensor or shard. The values in them are uncompressed and contiguous.
PyTorch gives their place: it can save without values (``torch.serialization.skip_data``), and load descriptions of
tensors that know their offset in the file. The result differs from that of ``torch.save`` in one point: the archive's
CRC-32 of the values is not computed (as with ``torch.serialization.set_crc32_options(False)``). PyTorch does not read
it, and the manifest has a stronger hash.
"""

from __future__ import annotations

import copy
import errno
import io
import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..checkpoint.safety import read_metadata
from ..checkpoint.tensors import StoredTensor
from ..checkpoint.tiling import require_tiled
from ..checkpoint.untrusted import DamagedCheckpoint
from ..errors import UserError
from .raw_bytes import opened_for_reading, read_exactly
from .tensor_source import ReadRows, rows_of


class _Values(NamedTuple):
    """The place and layout of a saved tensor's values."""

    offset: int
    """Offset in the file, in bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_contiguous: bool


def begin_tensor_file(path: Path, tensor: StoredTensor) -> int:
    """Create the file of ``tensor`` without its values, and return the offset in bytes where they belong.

    Raises:
        OSError: it cannot be written.
    """
    with FakeTensorMode():
        described = torch.empty(tensor.shape, dtype=tensor.dtype)
    try:
        # By name: only PyTorch's own stream skips the values.
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(described, str(path))
    except RuntimeError as error:
        raise _reason(path, tensor, error) from None
    with opened_for_reading(path) as descriptor:
        values = _find_values(_FilePart(descriptor, 0, os.fstat(descriptor).st_size))
    assert values[1:] == (tensor.shape, tensor.dtype, True), path
    return values.offset


def _reason(path: Path, tensor: StoredTensor, error: RuntimeError) -> OSError:
    """Return why ``path`` cannot be written. PyTorch's stream does not report it; repeating the write in Python
    does.
    """
    try:
        with open(path, "wb") as file:
            file.seek(tensor.num_bytes)
            file.write(bytes(4096))
    except OSError as cause:
        return cause
    return OSError(errno.EIO, f"PyTorch cannot write {path}: {error}")


class _FilePart(io.RawIOBase):
    """A range of bytes of a file, presented as a file."""

    def __init__(self, descriptor: int, start: int, length: int):
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if view else 0
        self._at += count
        return count


def _find_values(part: _FilePart) -> _Values:
    """Return the place of the values of the one tensor saved in ``part``, relative to its start. Executes no code."""
    with FakeTensorMode():
        loaded = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
    assert isinstance(loaded, Tensor)
    start = loaded.untyped_storage()._checkpoint_offset
    assert start is not None
    offset = start + int(loaded.storage_offset()) * loaded.dtype.itemsize
    return _Values(offset, tuple(loaded.shape), loaded.dtype, loaded.is_contiguous())


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, as written by one rank."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int
    stored_shape: tuple[int, ...]
    """Shape in the file."""


class CheckpointRows:
    """The tensors of a checkpoint, readable in parts whatever their shards (a ``TensorSource``).

    Args:
        folder: of the checkpoint.
        names: tensors to read, by default all.

    Raises:
        DamagedCheckpoint: the metadata cannot be read, or a tensor's shards do not cover it exactly.
    """

    def __init__(self, folder: str | Path, names: Collection[str] | None = None):
        metadata = read_metadata(folder)
        require_tiled(folder, metadata, metadata.state_dict_metadata if names is None else names)
        places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        """Names, shapes and dtypes."""
        self._chunks: dict[str, list[_Chunk]] = {}
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(item, TensorStorageMetadata) or (names is not None and name not in names):
                continue
            self.tensors[name] = StoredTensor(tuple(item.size), item.properties.dtype)
            self._chunks[name] = []
            for chunk in item.chunks:
                info = places.get((name, chunk.offsets))
                if info is None:
                    raise DamagedCheckpoint(f"{folder}: no file holds the chunk of {name} at {list(chunk.offsets)}")
                self._chunks[name].append(
                    _Chunk(
                        tuple(chunk.offsets) or (0,),
                        rows_of(tuple(chunk.sizes)),
                        self.folder / info.relative_path,
                        info.offset,
                        info.length,
                        rows_of(tuple(chunk.sizes)),
                    )
                )

    @property
    def paths(self) -> set[Path]:
        """The files that hold the tensors."""
        return {chunk.path for name in self.tensors for chunk in self._chunks[name]}

    def only(self, names: Iterable[str]) -> CheckpointRows:
        """Return the same checkpoint restricted to ``names``, in that order."""
        part = copy.copy(self)
        part.tensors = {name: self.tensors[name] for name in names}
        return part

    def flattened(self, names: Iterable[str]) -> CheckpointRows:
        """Return the same checkpoint with the shapes of ``names`` changed from [L, R, ...] to [L * R, ...].

        Raises:
            UserError: a shard has parts of several of the L.
        """
        part = copy.copy(self)
        part.tensors, part._chunks = dict(self.tensors), dict(self._chunks)
        for name in names:
            count, rows, *rest = self.tensors[name].shape
            part.tensors[name] = StoredTensor((count * rows, *rest), self.tensors[name].dtype)
            part._chunks[name] = [self._flat(name, chunk, rows) for chunk in self._chunks[name]]
        return part

    def _flat(self, name: str, chunk: _Chunk, rows: int) -> _Chunk:
        (index, first, *offsets), (count, num_rows, *sizes) = chunk.offsets, chunk.sizes
        if count > 1 and num_rows != rows:
            raise UserError(f"{self.folder}: a shard of {name} covers {num_rows} of the {rows} rows of several layers")
        return replace(chunk, offsets=(index * rows + first, *offsets), sizes=(count * num_rows, *sizes))

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~.tensor_source.TensorSource`. Files are opened when needed: there may be
        thousands.
        """
        found: dict[int, _Values | Tensor] = {}

        def read(first: int, rows: Tensor) -> None:
            for number, chunk in enumerate(self._chunks[name]):
                start = max(first, chunk.offsets[0])
                stop = min(first + rows.shape[0], chunk.offsets[0] + chunk.sizes[0])
                if start >= stop or 0 in chunk.sizes:
                    continue
                place = rows[start - first : stop - first]
                for axis in range(1, rows.dim()):
                    place = place.narrow(axis, chunk.offsets[axis], chunk.sizes[axis])
                with opened_for_reading(chunk.path) as descriptor:
                    if number not in found:
                        found[number] = self._locate(name, chunk, descriptor)
                    values = found[number]
                    if isinstance(values, Tensor):
                        place.copy_(values[start - chunk.offsets[0] : stop - chunk.offsets[0]])
                        continue
                    into = (
                        place
                        if place.is_contiguous()
                        else torch.empty_like(place, memory_format=torch.contiguous_format)
                    )
                    row_bytes = math.prod(chunk.sizes[1:]) * rows.dtype.itemsize
                    offset = chunk.start + values.offset + (start - chunk.offsets[0]) * row_bytes
                    read_exactly(descriptor, offset, into, chunk.path)
                    if into is not place:
                        place.copy_(into)

        yield read

    def _locate(self, name: str, chunk: _Chunk, descriptor: int) -> _Values | Tensor:
        """Return the place of the values of ``chunk``; or its values, if they are not stored row after row."""
        part = _FilePart(descriptor, chunk.start, chunk.length)
        try:
            values = _find_values(part)
            if rows_of(values.shape) == chunk.stored_shape and values.dtype == self.tensors[name].dtype:
                if values.is_contiguous:
                    return values
                part.seek(0)
                loaded: Tensor = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
                return loaded.reshape(chunk.sizes)
        except Exception as error:  # invalid archives raise many types
            raise DamagedCheckpoint(
                f"{chunk.path}: damaged ({type(error).__name__} at the place of {name}); use another checkpoint"
            ) from None
        raise DamagedCheckpoint(
            f"{chunk.path}: {name} is {list(values.shape)}, {values.dtype} there, but the metadata has "
            f"{list(chunk.stored_shape)}, {self.tensors[name].dtype}; use another checkpoint"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def write_metadata(folder: Path, tensors: Mapping[str, StoredTensor], files: Mapping[str, tuple[str, int]]) -> None:
    """Write DCP's ``.metadata`` for tensors that are each in a file of their own.

    Args:
        folder: of the checkpoint.
        tensors: every name with its shape and dtype.
        files: name of its file in ``folder``, and the file's size in bytes.
    """
    described = {name: torch.empty(item.shape, dtype=item.dtype, device="meta") for name, item in tensors.items()}
    with warnings.catch_warnings():  # DCP's own, about having no process group
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(described, storage_writer=_PlacedWriter(folder, files), no_dist=True)


class _PlacedWriter(dcp.FileSystemWriter):
    """Writes no values, only their places."""

    def __init__(self, folder: Path, files: Mapping[str, tuple[str, int]]):
        super().__init__(str(folder))
        self._files = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            file, size = self._files[item.index.fqn]
            results.append(WriteResult(item.index, size, _StorageInfo(file, 0, size)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future
