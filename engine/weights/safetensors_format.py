"""Write and check the headers of safetensors files (https://huggingface.co/docs/safetensors).

A file is 8 bytes of header length (little-endian), the header (a JSON object ``{name: {dtype, shape, data_offsets}}``,
padded with spaces to a multiple of 8 bytes), and the values of the tensors without gaps. Readers map files, so tensors
of wide dtypes come first: then each begins at a multiple of its width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .damage import DamagedCheckpoint
from .tensor_source import StoredTensor

SUFFIX = ".safetensors"
DTYPE_OF_CODE = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in a header, in the order in which their tensors are written."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_ORDER = {dtype: place for place, dtype in enumerate(CODE_OF_DTYPE)}
_MOST_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library reads."""


@dataclass(frozen=True)
class HeaderEntry:
    """The entry of one tensor in a header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the values in the file, in bytes."""


def in_file_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return ``tensors`` in the order in which the safetensors library writes them."""
    return dict(sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])))


def make_header(tensors: Mapping[str, StoredTensor]) -> tuple[bytes, dict[str, int], int]:
    """Return all bytes before the values of ``tensors``, in their order.

    Returns:
        Those bytes, the offset of each tensor in the file, and the size of the file, in bytes.
    """
    # transformers refuses files that do not name the framework that wrote them.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": CODE_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + at for name, at in starts.items()}, first + end


def read_header(path: Path, descriptor: int) -> dict[str, HeaderEntry]:
    """Read the header of the open file ``path``, and check that its tensors fill the rest of the file exactly.

    Raises:
        DamagedCheckpoint: the file is truncated, longer than its header says, or not a safetensors file.
        OSError: it cannot be read.
    """
    try:
        return _parse(descriptor)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DamagedCheckpoint(
            f"{path}: truncated or not a safetensors file ({reason}); use another checkpoint"
        ) from None


def _parse(descriptor: int) -> dict[str, HeaderEntry]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    first = 8 + length
    if size < 8 or length > _MOST_HEADER_BYTES or first > size:
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    header = json.loads(os.pread(descriptor, length, 8))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    header.pop("__metadata__", None)
    end = 0
    entries = {}
    for name, item in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = item["data_offsets"]
        if type(start) is not int or type(stop) is not int or start != end or stop < start:
            raise ValueError(f"{name[:100]} is at {start} to {stop}, byte {end} comes next")
        if not isinstance(item["dtype"], str) or not is_shape(item["shape"]):
            raise ValueError(f"{name[:100]} has no dtype or no shape")
        dtype = DTYPE_OF_CODE.get(item["dtype"])
        if dtype is not None and stop - start != math.prod(item["shape"]) * dtype.itemsize:
            raise ValueError(f"{name[:100]} of {item['dtype']} {item['shape']} has {stop - start:,} bytes")
        entries[name] = HeaderEntry(item["dtype"], tuple(item["shape"]), first + start)
        end = stop
    if first + end != size:
        raise ValueError(f"it has {size:,} bytes, its header describes {first + end:,}")
    return entries


def is_shape(value: Any) -> bool:
    """Return whether ``value``, from JSON, is a list of sizes or offsets."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)
