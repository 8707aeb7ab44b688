"""What a checkpoint from a stranger may not do: run code, or name a file outside its folder.

DCP keeps its ``.metadata`` as a pickle, which could call any function. Here, and only here, it is read: by an unpickler
that knows no more than the classes which such metadata consists of. Values are read by DCP itself, with ``torch.load``
and ``weights_only=True``, which no environment variable overrides where it is written out (torch.serialization.load);
its other way of reading, for items that are no tensors, unpickles anything and is never taken.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from collections.abc import Callable
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
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from ..errors import UserError

METADATA_FILE = ".metadata"
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
"""The folder that was written to, which nobody reads; held as a path that cannot touch the disk."""
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_UNREAD = {
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    (_MEGATRON, "MCoreSavePlan"),
}
"""Megatron keeps the plan by which it saved beside the metadata; nobody reads it."""


class DamagedCheckpoint(UserError):
    """A file of the checkpoint is not what was written: another one is needed."""


class Refused(Exception):
    """The metadata is not what DCP writes."""


def inert_class() -> type:
    """A class for objects of unknown classes in a pickle: they keep their attributes, and do nothing.

    A new one for each pickle, which can set attributes of what it has been given.
    """

    class Inert:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, dict):
                self.__dict__.update(state)

        def __setitem__(self, key: Any, value: Any) -> None:
            pass

        def extend(self, values: Any) -> None:
            pass

        append = add = extend

    return Inert


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata (torch 2.11 to 2.13) by name, and nothing else."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._inert = inert_class()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _UNREAD:
            return self._inert
        known: dict[tuple[str, str], Any] = {(item.__module__, item.__name__): item for item in _CLASSES[:-1]}
        known[("torch", "Size")] = torch.Size
        known[(_MEGATRON, "MCoreMetadata")] = Metadata
        known[("torch.serialization", "_get_layout")] = _layout_reader()
        for package in (pathlib.__name__, "pathlib._local"):
            known.update({(package, path): PurePosixPath for path in _PATHS})
        found = known.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise Refused(f"it asks for {module}.{name}, which is no part of a checkpoint's metadata")
        return found


def _layout_reader() -> Callable[[str], torch.layout]:
    # A function of its own for each load: a pickle can set attributes of what it has been given.
    def layout(name: str) -> torch.layout:
        if name != "torch.strided":
            raise Refused(f"a tensor's layout is {name!r}")
        return torch.strided

    return layout


def unpickle_metadata(file: IO[bytes]) -> Metadata:
    """The content of a ``.metadata`` file, which may be anybody's.

    Raises:
        Refused: it is something else.
        Exception: whatever the unpickler raises on damage.
    """
    before = [dict(vars(item)) for item in _CLASSES]
    try:
        loaded = _MetadataUnpickler(file).load()
    finally:
        changed = [_restore(item, attributes) for item, attributes in zip(_CLASSES, before, strict=True)]
    if any(changed):
        raise Refused("it changes PyTorch's classes")
    if not isinstance(loaded, Metadata):
        raise Refused(f"it holds a {type(loaded).__name__}")
    return loaded


def _restore(item: type, attributes: dict[str, Any]) -> bool:
    """Give a class its ``attributes`` back; whether it had been changed."""
    changed = [name for name, value in vars(item).items() if name not in attributes or attributes[name] is not value]
    for name in changed:
        if name in attributes:
            setattr(item, name, attributes[name])
        else:
            delattr(item, name)
    return bool(changed)


def read_metadata(folder: str | Path) -> Metadata:
    """DCP's description of the tensors in ``folder``: every name, shape, dtype, and where its values are.

    Raises:
        DamagedCheckpoint: it is missing or damaged, asks for code, or names a file outside ``folder``.
        UserError: it cannot be read.
    """
    path = Path(folder) / METADATA_FILE
    try:
        with open(file_inside(folder, METADATA_FILE), "rb") as file:
            loaded = unpickle_metadata(file)
        _require_sound(loaded, Path(folder))
    except UserError:
        raise
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing; use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Refused as error:
        raise DamagedCheckpoint(f"{path}: damaged or forged, {error}; use another checkpoint") from None
    except Exception as error:
        # Its own words may advise to unpickle without care. Bytes that are no pickle raise nearly anything.
        raise DamagedCheckpoint(f"{path}: damaged ({type(error).__name__}); use another checkpoint") from None
    return loaded


def _require_sound(loaded: Metadata, folder: Path) -> None:
    """Every part is of the type that DCP relies on."""
    tensors, places = loaded.state_dict_metadata, loaded.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise Refused("it has no tables of tensors and files")
    for name, item in tensors.items():
        if type(name) is not str or not isinstance(item, TensorStorageMetadata | BytesStorageMetadata):
            raise Refused(f"{name!r} is a {type(item).__name__}")
        if isinstance(item, TensorStorageMetadata):
            sizes = [item.size, *(part for chunk in item.chunks for part in (chunk.offsets, chunk.sizes))]
            if not all(isinstance(size, torch.Size) for size in sizes):
                raise Refused(f"{name} has a shape that is none")
            if not isinstance(item.properties.dtype, torch.dtype):
                raise Refused(f"{name} has no dtype")
    checked: set[str] = set()
    for index, info in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _INFO):
            raise Refused("its table of files holds something else")
        if type(info.offset) is not int or type(info.length) is not int or min(info.offset, info.length) < 0:
            raise Refused(f"{index.fqn} is at {info.offset!r}, {info.length!r} bytes")
        if info.transform_descriptors:
            raise Refused(f"{index.fqn} is transformed by {info.transform_descriptors!r}")
        if info.relative_path not in checked:
            file_inside(folder, info.relative_path)
            checked.add(info.relative_path)


def file_inside(folder: str | Path, name: Any) -> Path:
    """The path of the file ``name`` of a checkpoint, where ``name`` is what the checkpoint itself says.

    Raises:
        DamagedCheckpoint: it is absolute, has a part ``..``, or leads out of ``folder`` by a symbolic link.
    """
    if not isinstance(name, str) or not name or re.search(r"[\0\\\ud800-\udfff]", name):
        raise DamagedCheckpoint(f"{folder}: names a file {name!r}, which is no path; use another checkpoint")
    relative = PurePosixPath(name)
    real, root = os.path.realpath(Path(folder) / name), os.path.realpath(folder)
    if relative.is_absolute() or ".." in relative.parts or not real.startswith(os.path.join(root, "")):
        raise DamagedCheckpoint(f"{folder}: names a file {name!r}, which is not inside it; use another checkpoint")
    return Path(folder) / name


class SafeReader(filesystem.FileSystemReader):
    """Gives DCP what :func:`read_metadata` has checked, and reads nothing but tensors."""

    # Not called kwargs: DCP would then look for metadata of single ranks, and read it without care.
    def read_metadata(self, *_: Any, **options: Any) -> Metadata:
        loaded = read_metadata(Path(self.path))
        loaded.storage_meta = StorageMeta(load_id=self.load_id)
        return loaded

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            # That way of reading unpickles without an allow-list.
            if item.type == LoadItemType.BYTE_IO:
                raise Refused(f"{item.storage_index.fqn} is no tensor")
        return super().read_data(plan, planner)
