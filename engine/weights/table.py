"""Write and read ``tensors.json``, which lists the parts of every tensor of a checkpoint and their files.

    {"files": ["rank-00000.safetensors", ...],
     "tensors": {name: {"shape": [...], "dtype": "F32", "parts": [[number of the file, offsets, sizes], ...]}}}

In its file, a part has the name of its tensor, and the file's header gives its place. The table is written after the
files, and the manifest has its hash. The table may come from anyone, so all of it is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ..errors import UserError
from ..files.hashing import FileRecord
from ..files.regular import read_regular
from .coverage import Box
from .damage import TABLE_FILE, DamagedCheckpoint, brief, file_inside
from .parts import Part, TensorParts
from .safetensors_format import CODE_OF_DTYPE, DTYPE_OF_CODE, HeaderEntry, is_shape, read_header
from .tensor_source import StoredTensor, rows_of

_MOST_TABLE_BYTES = 1 << 30
"""About 10 million parts; the table of a 72B model with AdamW on 64 ranks has 0.2 million."""


@dataclass
class TableEntry:
    """One tensor, and the files that hold its parts."""

    tensor: StoredTensor
    parts: list[tuple[str, Box]]


def write_table(folder: Path, entries: Mapping[str, TableEntry]) -> FileRecord:
    """Write the table into ``folder``; return its size and hash.

    Raises:
        OSError: it cannot be written.
    """
    numbers: dict[str, int] = {}
    tensors = {
        name: {
            "shape": entry.tensor.shape,
            "dtype": CODE_OF_DTYPE[entry.tensor.dtype],
            "parts": [(numbers.setdefault(file, len(numbers)), *box) for file, box in entry.parts],
        }
        for name, entry in entries.items()
    }
    data = json.dumps({"files": list(numbers), "tensors": tensors}, separators=(",", ":")).encode()
    (folder / TABLE_FILE).write_bytes(data)
    return FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))


def read_table(folder: Path) -> TensorParts:
    """Return the tensors of the checkpoint ``folder`` and the places of their parts.

    Raises:
        DamagedCheckpoint: the table is missing or invalid, or names a file outside ``folder``.
        UserError: it cannot be read.
    """
    path = folder / TABLE_FILE
    try:
        content = json.loads(read_regular(file_inside(folder, TABLE_FILE), _MOST_TABLE_BYTES))
        return _parse(content, folder, path)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing; use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: damaged ({str(error)[:300]}); use another checkpoint") from None


def _parse(content: Any, folder: Path, path: Path) -> TensorParts:
    if not isinstance(content, dict) or content.keys() != {"files", "tensors"}:
        raise ValueError("it is not a table of files and tensors")
    files, tensors = content["files"], content["tensors"]
    if not isinstance(files, list) or not isinstance(tensors, dict):
        raise ValueError("it has no list of files or no tensors")
    opened = [_SafetensorsFile(file_inside(folder, name)) for name in files]
    stored, parts = {}, {}
    for name, item in tensors.items():
        if not isinstance(item, dict) or item.keys() != {"shape", "dtype", "parts"}:
            raise ValueError(f"{brief(name)} is not described by shape, dtype and parts")
        if not is_shape(item["shape"]) or not isinstance(item["dtype"], str) or item["dtype"] not in DTYPE_OF_CODE:
            raise ValueError(f"{brief(name)} has shape {brief(item['shape'])}, dtype {brief(item['dtype'])}")
        stored[name] = StoredTensor(tuple(item["shape"]), DTYPE_OF_CODE[item["dtype"]])
        parts[name] = [_part(part, name, stored[name], opened) for part in _list(item["parts"])]
    return TensorParts(path, stored, parts)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{brief(value)} is not a list of parts")
    return value


def _part(value: Any, name: str, stored: StoredTensor, files: Sequence[_SafetensorsFile]) -> Part:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{brief(name)} has a part {brief(value)}")
    number, offsets, sizes = value
    if type(number) is not int or not 0 <= number < len(files) or not is_shape(offsets) or not is_shape(sizes):
        raise ValueError(f"{brief(name)} has a part in file {brief(number)} at {brief(offsets)} of {brief(sizes)}")
    if not len(offsets) == len(sizes) == len(stored.shape):
        raise ValueError(f"{brief(name)} is {list(stored.shape)}, a part {brief(sizes)} at {brief(offsets)}")
    file, box = files[number], StoredTensor(tuple(sizes), stored.dtype)
    return Part(tuple(offsets) or (0,), rows_of(box.shape), file.path, partial(file.find, name, box))


class _SafetensorsFile:
    """A file of the checkpoint. Its header is read with the first of its tensors."""

    def __init__(self, path: Path):
        self.path = path
        self._header: dict[str, HeaderEntry] | None = None

    def find(self, name: str, stored: StoredTensor, descriptor: int) -> int:
        """Return the offset of the part of ``name`` in the file, after comparing its entry with the table."""
        if self._header is None:
            self._header = read_header(self.path, descriptor)
        entry = self._header.get(name)
        if entry is None or (entry.shape, entry.dtype) != (stored.shape, CODE_OF_DTYPE[stored.dtype]):
            there = f"{list(entry.shape)}, {entry.dtype} there" if entry else "not there"
            listed = f"{list(stored.shape)}, {CODE_OF_DTYPE[stored.dtype]}"
            raise DamagedCheckpoint(
                f"{self.path}: {name} is {there}, {TABLE_FILE} says {listed}; use another checkpoint"
            )
        return entry.start
