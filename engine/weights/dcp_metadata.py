"""Read the pickled metadata of PyTorch's distributed checkpoint (DCP) without running code.

Megatron's checkpoints have such a ``.metadata``, and ours had one up to manifest format 2. A pickle could call any
function. Only this module reads it, with an unpickler that knows just the classes of such metadata. Before that,
:func:`check_pickle_size` checks that it needs no more memory than its length explains.
"""

from __future__ import annotations

import gc
import pathlib
import pickle
import pickletools
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import UserError
from ..files.regular import open_regular
from .damage import METADATA_FILE, DamagedCheckpoint, brief, file_inside

_MAX_METADATA_BYTES = 1 << 30
"""About 5 million parts of tensors; the table for a 72B model with AdamW on 64 ranks has 0.2 million."""
_ENCODING = metadata._MEM_FORMAT_ENCODING
_INFO = filesystem._StorageInfo
_CLASSES: tuple[type, ...] = (
    Metadata,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    MetadataIndex,
    StorageMeta,
    _ENCODING,
    _INFO,
    PurePosixPath,
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
"""Classes of the folder that was written to, which is unused; read as a path that cannot touch the disk."""
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_UNREAD = {
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    (_MEGATRON, "MCoreSavePlan"),
}
"""Classes of the save plan that Megatron stores with the metadata; it is unused."""
_MAX_PATH = 1 << 16
"""Limit of characters in the path of a folder; systems allow 4096."""
_MAX_DIMS = 64
"""Limit of a tensor's dimensions; PyTorch sums over no more."""
_ARGUMENT_BYTES: list[int | None] = [None] * 256
"""Number of bytes of each pickle instruction's argument, or how they are counted, by the instruction's code."""
for _op in pickletools.opcodes:
    _ARGUMENT_BYTES[ord(_op.code)] = 0 if _op.arg is None else _op.arg.n
_COUNTED = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}
_COUNTED |= {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
_PUT, _LONG_BINPUT, _STOP = (code[0] for code in (pickle.PUT, pickle.LONG_BINPUT, pickle.STOP))
_TWO_LINES = (pickle.GLOBAL[0], pickle.INST[0])


class Refused(Exception):
    """The metadata is not what DCP writes."""


def placeholder_class() -> type:
    """Return a class for objects of unknown classes in a pickle: they keep their attributes, and do nothing.

    Every pickle needs a new one, because it can set attributes of the class.
    """

    class Inert:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, dict):
                self.__dict__ = state  # Not a copy: a thousand objects may be given one huge state.

        def __setitem__(self, key: Any, value: Any) -> None:
            pass

        def extend(self, values: Any) -> None:
            pass

        append = add = extend

    return Inert


def check_pickle_size(pickled: bytes) -> None:
    """Refuse a pickle that needs more memory than its length explains, before anything is unpickled.

    Python's unpickler reserves 16 bytes for every number below the one under which a value is remembered: 9 bytes can
    cost 68 GB. Real pickles number from zero, so no number exceeds its own position. Strings must end within
    the file. Then memory is in proportion to the file, or to its square if many objects are given one large state.
    A hostile pickle can still take long, and a million nested tuples can end the process.

    Raises:
        Refused: it needs more, or is not a pickle.
    """
    at, end, lengths = 0, len(pickled), _ARGUMENT_BYTES
    while at < end:
        code = pickled[at]
        length = lengths[code]
        if length is None:
            raise Refused(f"byte {at} is not a pickle instruction")
        if length >= 0:
            if code == _STOP:
                return
            if code == _LONG_BINPUT:
                _require_counted(int.from_bytes(pickled[at + 1 : at + 5], "little"), at)
            at += 1 + length
        elif length == pickletools.UP_TO_NEWLINE:
            stop = _line_end(pickled, at)
            if code == _PUT:
                _require_counted(int(pickled[at + 1 : min(stop, at + 20)]), at)
            at = (_line_end(pickled, stop) if code in _TWO_LINES else stop) + 1
        else:
            count = _COUNTED[length]
            at += 1 + count + int.from_bytes(pickled[at + 1 : at + 1 + count], "little")
    raise Refused("its pickle does not end")


def _require_counted(number: int, at: int) -> None:
    if number > at:
        raise Refused(f"its pickle remembers {number:,} values in {at:,} bytes")


def _line_end(pickled: bytes, at: int) -> int:
    found = pickled.find(b"\n", at + 1)
    if found < 0:
        raise Refused("its pickle does not end")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata (torch 2.11 to 2.13) by name, and nothing else."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._inert = placeholder_class()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _UNREAD:
            return self._inert
        known: dict[tuple[str, str], Any] = {(item.__module__, item.__name__): item for item in _CLASSES[:-1]}
        known[("torch", "Size")] = _size_maker()
        known[(_MEGATRON, "MCoreMetadata")] = Metadata
        known[("torch.serialization", "_get_layout")] = _layout_reader()
        for package in (pathlib.__name__, "pathlib._local"):
            known.update(dict.fromkeys([(package, path) for path in _PATHS], _path_maker()))
        found = known.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise Refused(f"it asks for {brief(f'{module}.{name}')}, which is not part of a checkpoint's metadata")
        return found


def _layout_reader() -> Callable[[str], torch.layout]:
    # A new function for each load, because a pickle can set its attributes.
    def layout(name: str) -> torch.layout:
        if name != "torch.strided":
            raise Refused(f"a tensor's layout is {brief(name)}")
        return torch.strided

    return layout


def _path_maker() -> Callable[..., PurePosixPath]:
    # Paths made of paths would double with each, to any size.
    def path(*parts: str) -> PurePosixPath:
        if not all(type(part) is str for part in parts) or sum(map(len, parts)) + len(parts) > _MAX_PATH:
            raise Refused("its folder is not a path")
        return PurePosixPath(*parts)

    return path


def _size_maker() -> Callable[[Any], torch.Size]:
    # Each would be a copy of a tuple that may be huge.
    def size(dims: Any) -> torch.Size:
        if len(dims) > _MAX_DIMS:
            raise Refused(f"a shape has {len(dims)} dimensions")
        return torch.Size(dims)

    return size


def unpickle_metadata(file: IO[bytes]) -> Metadata:
    """Return the content of a ``.metadata`` file, which is untrusted.

    Raises:
        Refused: it is something else.
        Exception: any error of the unpickler on damage.
    """
    pickled = file.read(_MAX_METADATA_BYTES + 1)
    if len(pickled) > _MAX_METADATA_BYTES:
        raise Refused(f"it is larger than {_MAX_METADATA_BYTES:,} bytes")
    check_pickle_size(pickled)
    before = [dict(vars(item)) for item in _CLASSES]
    collecting = gc.isenabled()
    gc.disable()  # It would scan all new objects repeatedly, which takes longer than creating them.
    try:
        loaded = _MetadataUnpickler(BytesIO(pickled)).load()
    finally:
        if collecting:
            gc.enable()
        changed = [_restore(item, attributes) for item, attributes in zip(_CLASSES, before, strict=True)]
    if any(changed):
        raise Refused("it changes PyTorch's classes")
    if not isinstance(loaded, Metadata):
        raise Refused(f"it holds a {type(loaded).__name__}")
    return loaded


def _restore(item: type, attributes: dict[str, Any]) -> bool:
    """Restore the ``attributes`` of a class; return whether it had been changed."""
    changed = [name for name, value in vars(item).items() if name not in attributes or attributes[name] is not value]
    for name in changed:
        if name in attributes:
            setattr(item, name, attributes[name])
        else:
            delattr(item, name)
    return bool(changed)


def read_metadata(folder: str | Path) -> Metadata:
    """Return DCP's description of the tensors in ``folder``: every name, shape, dtype, and the place of its values.

    Raises:
        DamagedCheckpoint: it is missing or damaged, asks for code, or names a file outside ``folder``.
        UserError: it cannot be read.
    """
    path = Path(folder) / METADATA_FILE
    try:
        with open_regular(file_inside(folder, METADATA_FILE)) as file:
            loaded = unpickle_metadata(file)
        _check_types(loaded, Path(folder))
    except UserError:
        raise
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing; use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Refused as error:
        raise DamagedCheckpoint(f"{path}: damaged or forged, {error}; use another checkpoint") from None
    except Exception as error:
        # Its own message may advise to unpickle without safety. Invalid pickles raise many types of errors.
        raise DamagedCheckpoint(f"{path}: damaged ({type(error).__name__}); use another checkpoint") from None
    return loaded


def _check_types(loaded: Metadata, folder: Path) -> None:
    """Check that every part has the type that DCP relies on."""
    tensors, places = loaded.state_dict_metadata, loaded.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise Refused("it has no tables of tensors and files")
    for name, item in tensors.items():
        if type(name) is not str or not isinstance(item, TensorStorageMetadata | BytesStorageMetadata):
            raise Refused(f"{brief(name)} is a {type(item).__name__}")
        if isinstance(item, TensorStorageMetadata):
            sizes = [item.size, *(part for chunk in item.chunks for part in (chunk.offsets, chunk.sizes))]
            if not all(isinstance(size, torch.Size) for size in sizes):
                raise Refused(f"{brief(name)}: invalid shape")
            if not isinstance(item.properties.dtype, torch.dtype):
                raise Refused(f"{brief(name)} has no dtype")
    checked: set[str] = set()
    for index, info in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _INFO):
            raise Refused("its table of files holds something else")
        if type(info.offset) is not int or type(info.length) is not int or min(info.offset, info.length) < 0:
            raise Refused(f"{brief(index.fqn)} is at {brief(info.offset)}, {brief(info.length)} bytes")
        if info.transform_descriptors:
            raise Refused(f"{brief(index.fqn)} is transformed by {brief(info.transform_descriptors)}")
        if info.relative_path not in checked:
            file_inside(folder, info.relative_path)
            checked.add(info.relative_path)
