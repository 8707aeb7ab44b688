"""Read and write single tensors in the files of PyTorch's distributed checkpoint (DCP), in parts.

Megatron's checkpoints consist of them, and ours did up to manifest format 2. DCP itself reads and writes whole tensors,
and holds the largest one in memory two or three times. Its files are zip archives as written by ``torch.save``, one per
tensor or shard. The values in them are uncompressed and contiguous. PyTorch gives their place: it can save without
values (``torch.serialization.skip_data``), and load descriptions of tensors that know their offset in the file. The
result differs from that of ``torch.save`` in one point: the archive's CRC-32 of the values is not computed (as with
``torch.serialization.set_crc32_options(False)``). PyTorch does not read it.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .damage import METADATA_FILE, DamagedCheckpoint
from .dcp_metadata import read_metadata
from .parts import Part, TensorParts
from .raw_bytes import opened_for_reading
from .tensor_source import StoredTensor, rows_of


class _SavedValues(NamedTuple):
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


def _find_values(part: _FilePart) -> _SavedValues:
    """Return the place of the values of the one tensor saved in ``part``, relative to its start. Executes no code."""
    with FakeTensorMode():
        loaded = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
    assert isinstance(loaded, Tensor)
    start = loaded.untyped_storage()._checkpoint_offset
    assert start is not None
    offset = start + int(loaded.storage_offset()) * loaded.dtype.itemsize
    return _SavedValues(offset, tuple(loaded.shape), loaded.dtype, loaded.is_contiguous())


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_dcp_parts(folder: str | Path, names: Collection[str] | None = None) -> TensorParts:
    """Return the tensors of the checkpoint ``folder`` and the places of their parts.

    Args:
        folder: of the checkpoint.
        names: tensors to read, by default all.

    Raises:
        DamagedCheckpoint: the metadata cannot be read, or names no file for a part.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, list[Part]] = {}
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata) or (names is not None and name not in names):
            continue
        tensors[name] = StoredTensor(tuple(item.size), item.properties.dtype)
        parts[name] = []
        for chunk in item.chunks:
            info = places.get((name, chunk.offsets))
            if info is None:
                raise DamagedCheckpoint(f"{folder}: no file holds the chunk of {name} at {list(chunk.offsets)}")
            path, sizes = folder / info.relative_path, rows_of(tuple(chunk.sizes))
            find = partial(_locate, name, StoredTensor(sizes, item.properties.dtype), path, info)
            parts[name].append(Part(tuple(chunk.offsets) or (0,), sizes, path, find))
    return TensorParts(folder / METADATA_FILE, tensors, parts)


def _locate(name: str, stored: StoredTensor, path: Path, info: _StorageInfo, descriptor: int) -> int | Tensor:
    """Return the place of the values of a part; or its values, if they are not stored row after row."""
    part = _FilePart(descriptor, info.offset, info.length)
    try:
        values = _find_values(part)
        if rows_of(values.shape) == stored.shape and values.dtype == stored.dtype:
            if values.is_contiguous:
                return info.offset + values.offset
            part.seek(0)
            loaded: Tensor = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
            return loaded.reshape(stored.shape)
    except Exception as error:  # invalid archives raise many types
        raise DamagedCheckpoint(
            f"{path}: damaged ({type(error).__name__} at the place of {name}); use another checkpoint"
        ) from None
    raise DamagedCheckpoint(
        f"{path}: {name} is {list(values.shape)}, {values.dtype} there, but the metadata has "
        f"{list(stored.shape)}, {stored.dtype}; use another checkpoint"
    )
