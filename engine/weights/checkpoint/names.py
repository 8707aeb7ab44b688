"""Names of complete checkpoints, and which of them a folder holds."""

from __future__ import annotations

import re
from pathlib import Path

from .manifest import MANIFEST_FILE

DAMAGED = ".damaged"
"""Ending of the name of a checkpoint that was quarantined."""
REWOUND = ".rewound"
"""The same, of one that the run has gone back behind."""
_COMPLETE = re.compile(r"^step-(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """The name of the complete checkpoint of ``step``."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether complete checkpoints have such names."""
    return _COMPLETE.match(name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def named_checkpoints(folder: Path) -> list[Path]:
    """Every folder in ``folder`` with the name of a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if is_checkpoint_name(entry.name) and entry.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those that have a manifest, oldest first."""
    return [checkpoint for checkpoint in named_checkpoints(folder) if (checkpoint / MANIFEST_FILE).is_file()]
