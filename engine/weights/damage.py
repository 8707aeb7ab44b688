"""Report damaged checkpoints, and check the names and values in them, which may come from anyone."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError

TABLE_FILE = "tensors.json"
"""Lists the parts of all tensors in a checkpoint and their files."""
METADATA_FILE = ".metadata"
"""The same in a checkpoint of PyTorch's distributed checkpoint (DCP)."""


class DamagedCheckpoint(UserError):
    """A file of a checkpoint differs from what was written."""


def brief(value: Any) -> str:
    """Return a short text of an untrusted ``value``, whose ``repr`` can have any length."""
    if isinstance(value, str | bytes):
        return repr(value[:200]) + ("..." if len(value) > 200 else "")
    items = value if type(value) in (list, tuple) and len(value) <= 20 else [value]
    if all(item is None or type(item) in (int, float, bool) for item in items):
        return repr(value) if all(type(item) is not int or item.bit_length() <= 64 for item in items) else "a number"
    return f"a {type(value).__name__}"


def file_inside(folder: str | Path, name: Any) -> Path:
    """Return the path of the file ``name`` in a checkpoint, which gives this name itself.

    Raises:
        DamagedCheckpoint: it is absolute, has a part ``..``, or is outside ``folder`` through a symbolic link.
    """
    if not isinstance(name, str) or not name or re.search(r"[\0\\\ud800-\udfff]", name):
        raise DamagedCheckpoint(f"{folder}: names a file {brief(name)}, which is not a path; use another checkpoint")
    relative = PurePosixPath(name)
    real, root = os.path.realpath(Path(folder) / name), os.path.realpath(folder)
    if relative.is_absolute() or ".." in relative.parts or not real.startswith(os.path.join(root, "")):
        raise DamagedCheckpoint(f"{folder}: names a file {brief(name)}, which is not inside it; use another checkpoint")
    if os.path.exists(real) and not os.path.isfile(real) and not os.path.isdir(real):
        raise DamagedCheckpoint(f"{Path(folder) / name}: not a regular file; use another checkpoint")
    return Path(folder) / name
