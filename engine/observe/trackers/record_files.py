"""Read the files that wandb and swanlab write offline: which steps they have.

Both are logs as of LevelDB: after a header of 7 bytes, blocks of 32 KiB with pieces of records, each with a checksum, a
length and a type. A record is a protobuf of the library. The last record of a killed run may be incomplete.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER, _BLOCK = 7, 32768
_PIECE = struct.Struct("<IHB")
"""Header of a piece: checksum, length, type."""
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_steps_in_wandb(folder: Path, run_id: str) -> dict[str, int]:
    """Return the last step of every metric of a run in wandb's files in ``folder``."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    last: dict[str, int] = {}
    for record in _all_records(folder, f"*run-*-{run_id}/run-{run_id}.wandb", messages.Record):
        if record.HasField("history"):
            step = record.history.step.num
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                last[name] = max(step, last.get(name, step))
    return last


def last_steps_in_swanlab(folder: Path, run_id: str) -> dict[str, int]:
    """Return the last step of every metric of a run in swanlab's files in ``folder``."""
    messages: Any = importlib.import_module("swanlab.proto.swanlab.record.v1.record_pb2")
    last: dict[str, int] = {}
    for record in _all_records(folder, f"run-*-{run_id}/run-{run_id}.swanlab", messages.Record):
        for kind in ("scalar", "media"):
            if record.HasField(kind):
                point = getattr(record, kind)
                last[point.key] = max(point.step, last.get(point.key, point.step))
    return last


def _all_records(folder: Path, pattern: str, message: Any) -> Iterator[Any]:
    for path in sorted(folder.glob(pattern)):
        for content in records(path.read_bytes()):
            yield message.FromString(content)


def records(content: bytes) -> Iterator[bytes]:
    """Yield the complete records of a file, up to the first incomplete one."""
    position, parts = _FILE_HEADER, b""
    while position + _PIECE.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _PIECE.size:  # the rest of a block that has no room for a header
            position += left
            continue
        _, length, kind = _PIECE.unpack_from(content, position)
        begin, position = position + _PIECE.size, position + _PIECE.size + length
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or position > len(content):
            return
        parts = (b"" if kind in (_WHOLE, _FIRST) else parts) + content[begin:position]
        if kind in (_WHOLE, _LAST):
            yield parts
