"""Name checkpoints, and find them in a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import UserError
from .manifest import MANIFEST_FILE

EXPORTS = "hf"
"""Folder in a run folder with the exports of its checkpoints."""
FINAL_MODEL, BEST_MODEL = "final_model", "best_model"
"""Folders in a run folder with the model at the end, and that of the lowest loss."""
CONVERSION_FILE = "conversion.json"
"""The record of a conversion in the folder that it has written; see :mod:`..conversion.provenance`."""
PEFT_EXPORTS = "peft"
"""Folder in a run folder with the adapters of its checkpoints as folders of PEFT."""
DAMAGED = ".damaged"
"""Added to the name of a checkpoint that is damaged."""
REWOUND = ".rewound"
"""Added to the name of a checkpoint of steps that a rollback has discarded."""
_COMPLETE = re.compile(r"^step-(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of ``step``."""
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Return whether ``name`` is that of a checkpoint."""
    return _COMPLETE.match(name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def named_checkpoints(folder: Path) -> list[Path]:
    """Return all folders in ``folder`` with the name of a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if is_checkpoint_name(entry.name) and entry.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` that have a manifest, oldest first."""
    return [checkpoint for checkpoint in named_checkpoints(folder) if (checkpoint / MANIFEST_FILE).is_file()]


def require_no_broken_link(folder: Path, least_step: int = 0) -> None:
    """Refuse broken links in ``folder`` with the name of a checkpoint of at least ``least_step`` steps.

    Raises:
        UserError: names the link and its target.
    """
    links = sorted(
        (path for path in folder.glob("step-*") if is_checkpoint_name(path.name) and not path.exists()),
        key=step_of,
    )
    if links and step_of(links[-1]) >= least_step:
        raise UserError(
            f"{links[-1]}: a link to {os.readlink(links[-1])}, which does not exist; mount the disk or put the "
            "checkpoint back, or remove the link to continue without it"
        )
