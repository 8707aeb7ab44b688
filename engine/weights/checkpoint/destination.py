"""Check before the first step of a run that its folders can be written and that a checkpoint fits on the disk.

Without this check, a file in the place of ``checkpoints``, a read-only mount or a small disk would be noticed at the
first save, hours after the start.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...config.settings import RunConfig
from ...errors import UserError
from ...files.disk_space import NO_SPACE, format_bytes, free_bytes, nearest, require_space
from ...files.removal import remove_tree
from ...model.architecture import Architecture
from ...model.dtypes import DTYPES
from ...model.implementations import meta_model
from ...observe.curves import TENSORBOARD_FOLDER
from ...parallel import trainable
from .names import PEFT_EXPORTS
from .store import CheckpointStore

_EXPORT_BYTES = 2
"""Minimum size of a parameter in a Hugging Face folder."""


def require_writable(folders: Iterable[Path]) -> None:
    """Refuse ``folders`` that cannot be created or written to. Nothing is left behind.

    Raises:
        UserError: names the path that is in the way, and the reason.
    """
    tested = set()
    for folder in folders:
        place = nearest(folder)
        if place not in tested:
            _require_writable(place, folder)
            tested.add(place)


def _require_writable(place: Path, folder: Path) -> None:
    """Create and remove a folder in ``place``, with a file of one byte."""
    if place.is_symlink() and not os.path.exists(place):
        raise UserError(
            f"{place}: a link to {os.readlink(place)}, which cannot be followed{_reason(place)}; mount or make what it "
            f"leads to, or remove the link: the run writes to {folder}"
        )
    if os.path.exists(place) and not place.is_dir():
        raise UserError(f"{place}: a file, where the run needs the folder {folder}; move it away")
    probe = None
    try:
        probe = Path(tempfile.mkdtemp(prefix=".retemper-probe-", dir=place))
        (probe / "byte").write_bytes(b"\0")
    except OSError as error:
        reason = "no space left" if error.errno in NO_SPACE else error.strerror or str(error)
        raise UserError(
            f"{place}: cannot be written: {reason}; the run writes to {folder}: make it writable, or choose another "
            "run_folder"
        ) from None
    finally:
        if probe is not None:
            remove_tree(probe)


def _reason(link: Path) -> str:
    try:
        os.stat(link)
    except OSError as error:
        return f" ({error.strerror})"
    return ""


def checkpoint_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Return the size of a checkpoint without small files: weights; states and averages of trainable parameters.

    With an adapter, these are only those of the parameters that learn.
    """
    weight, trained = DTYPES[config.training.weight_dtype].itemsize, trainable.learned(architecture, config)
    num_trained = sum(math.prod(shape) for shape in trained.values())
    stored = num_trained
    if config.adapter.kind is None:
        stored = sum(parameter.numel() for parameter in meta_model(architecture).parameters())
    of_trained = trainable.state_bytes(architecture, config) + num_trained * config.training.average_bytes
    return stored * weight + of_trained


def require_destination(
    config: RunConfig, store: CheckpointStore, architecture: Architecture, steps: int, exports: Sequence[Path]
) -> list[str]:
    """Check everything that a run of ``steps`` more steps will write to. Called on the main rank.

    Args:
        config: of the run.
        store: of its checkpoints; is told their expected size.
        architecture: of the model.
        steps: see above.
        exports: the folders that exports will be in.

    Returns:
        Notes for the log, if a checkpoint fits on the disk, but not all that will be kept.

    Raises:
        UserError: a folder cannot be written, or its disk is too small.
    """
    run_folder = Path(config.run_folder)
    folders = [run_folder, *[run_folder / TENSORBOARD_FOLDER] * config.logging.tensorboard]
    require_writable([*folders, *[store.folder] * (steps > 0), *exports])
    trained = trainable.count(architecture, config.training, config.adapter)
    for folder in exports:
        size = (trained if folder.name == PEFT_EXPORTS else architecture.num_parameters) * _EXPORT_BYTES
        require_space(folder, size, "the Hugging Face folder of checkpoint.export_hf", lambda: "free some space there")
    if not steps:
        return []
    size = store.expected_bytes = checkpoint_bytes(config, architecture)
    require_space(store.folder, size, "a checkpoint", store.describe_pruning)
    return _note_on_space(config, store, steps, size)


def _note_on_space(config: RunConfig, store: CheckpointStore, steps: int, size: int) -> list[str]:
    keep = config.checkpoint
    present, free = len(store.complete()), free_bytes(store.folder)
    every = steps // keep.keep_every if keep.keep_every else 0
    kept = keep.keep_last + 1 + bool(keep.keep_best) + every  # one more while it is written
    more = min(kept - min(present, kept), _most_saves(keep.save_interval, steps))
    if free >= more * size:
        return []
    return [
        f"note: {store.folder} will hold {more} more checkpoints of about {format_bytes(size)} at a time, but only "
        f"{format_bytes(free)} are free there; lower checkpoint.keep_last or free some space"
    ]


def _most_saves(interval: int | str, steps: int) -> int:
    """Return how many checkpoints ``steps`` steps write at most; that of every epoch is not known here."""
    return steps if isinstance(interval, str) else -(-steps // interval)
