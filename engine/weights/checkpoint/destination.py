"""Where a run will write, tested before its first step: a folder can be made there, and a checkpoint fits on the disk.

Without this test, a file in the place of ``checkpoints``, a read-only mount or a small disk would show at the first
save only, hours after the start.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.settings import RunConfig
from ...errors import UserError
from ...files.disk_space import NO_SPACE, format_bytes, free_bytes, nearest, require_space
from ...files.lock import LOCK_FILE
from ...model.architecture import Architecture
from ...model.decoder import meta_decoder
from ...model.dtypes import DTYPES
from ...observe.curves import METRICS_FILE, TENSORBOARD_FOLDER
from ...parallel import trainable
from .run_record import CONFIG_FILE, RECORD_FILE

if TYPE_CHECKING:
    from .store import CheckpointStore

_EXPORT_BYTES = 2
"""Of a parameter in a Hugging Face folder, at least."""


def require_writable(folders: Iterable[Path]) -> None:
    """Refuse ``folders`` that cannot be made or written to. Nothing is left behind.

    Raises:
        UserError: naming the path that is in the way, and the reason.
    """
    tested = set()
    for folder in folders:
        place = nearest(folder)
        if place not in tested:
            _require_writable(place, folder)
            tested.add(place)


def require_record_files(run_folder: Path) -> None:
    """Refuse a folder, a FIFO or a device in the place of a file that the run reads and writes.

    To be called before any of them is opened: a FIFO would be waited for, a device read without end.

    Raises:
        UserError: naming it.
    """
    for path in (run_folder / name for name in (METRICS_FILE, CONFIG_FILE, RECORD_FILE, LOCK_FILE)):
        if os.path.exists(path) and not path.is_file():
            raise UserError(
                f"{path}: not a regular file, where the run keeps one; move it away, or choose another run_folder"
            )


def _require_writable(place: Path, folder: Path) -> None:
    """Make a folder in ``place``, and a file of one byte in it."""
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
            shutil.rmtree(probe, ignore_errors=True)


def _reason(link: Path) -> str:
    try:
        os.stat(link)
    except OSError as error:
        return f" ({error.strerror})"
    return ""


def checkpoint_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Size of one checkpoint: weights, and both moments of what learns. The small files are left out."""
    decoder = meta_decoder(architecture)
    trainable.apply(decoder, config.training)
    weight, state = DTYPES[config.training.weight_dtype].itemsize, DTYPES[config.optimizer.state_dtype].itemsize
    return sum(p.numel() * (weight + 2 * state * p.requires_grad) for p in decoder.parameters())


def require_destination(
    config: RunConfig, store: CheckpointStore, architecture: Architecture, steps: int, export_folder: Path
) -> list[str]:
    """Test all that a run of ``steps`` more steps will write to. Called on the main rank.

    Returns:
        notes for the log: the disk can take a checkpoint, but not all that are kept.

    Raises:
        UserError: a folder cannot be written, or its disk is too small.
    """
    run_folder = Path(config.run_folder)
    folders = [run_folder, *[run_folder / TENSORBOARD_FOLDER] * config.logging.tensorboard]
    exports = config.checkpoint.export_hf
    require_writable([*folders, *[store.folder] * (steps > 0), *[export_folder] * exports])
    if exports:
        size = architecture.num_parameters * _EXPORT_BYTES
        require_space(
            export_folder, size, "the Hugging Face folder of checkpoint.export_hf", lambda: "free some space there"
        )
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
    more = min(kept - min(present, kept), -(-steps // keep.save_interval))
    if free >= more * size:
        return []
    return [
        f"note: {store.folder} will take {more} more checkpoints of about {format_bytes(size)} at a time, but only "
        f"{format_bytes(free)} are free there; lower checkpoint.keep_last or make space"
    ]
