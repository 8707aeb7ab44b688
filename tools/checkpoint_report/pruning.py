"""Remove checkpoints that no retention rule keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ...engine.errors import UserError
from ...engine.files.lock import run_folder_lock
from ...engine.parallel.process_group import Ranks
from ...engine.weights.checkpoint.retention import intact_checkpoints, reasons_when_pruning
from ...engine.weights.checkpoint.store import CheckpointStore
from .listing import checkpoint_folder


def prune(
    run_folder: Path, keep_last: int, keep_every: int = 0, dry_run: bool = False, say: Callable[[str], None] = print
) -> None:
    """Remove all checkpoints of a run but the newest, those at multiples of ``keep_every`` steps, and the best.

    Damaged ones are neither counted nor removed. For a link, only the link is removed.

    Raises:
        UserError: it is not a run folder, a run is writing to it, or a checkpoint cannot be removed.
    """
    checkpoint_folder(run_folder)
    store = CheckpointStore(run_folder, Ranks(0, 1, torch.device("cpu")), keep_last, keep_best=True)
    if dry_run:
        _prune(store, keep_last, keep_every, say, remove=False)
        return
    try:
        with run_folder_lock(run_folder) as notes:
            for note in notes:
                say(note)
            _prune(store, keep_last, keep_every, say, remove=True)
    except OSError as error:
        raise UserError(f"{error.filename or run_folder}: {error.strerror or error}") from None


def _prune(store: CheckpointStore, keep_last: int, keep_every: int, say: Callable[[str], None], remove: bool) -> None:
    complete = store.complete()
    whole = intact_checkpoints(complete)
    problems: list[str] = []
    for folder, reasons in reasons_when_pruning(whole, keep_last, keep_every).items():
        if reasons:
            say(f"keep    {folder} ({', '.join(reasons)})")
        elif remove:
            problems += (left := store.remove(folder))
            say(f"removed {folder}" if not left else f"removed in part: {folder}")
        else:
            say(f"remove  {folder}")
    for folder in (folder for folder in complete if folder not in whole):
        say(f"damaged {folder}: not removed; see verify")
    if problems:
        raise UserError(f"{problems[0]}; {len(problems)} files or folders could not be removed: remove them yourself")
