"""Rewrite checkpoints of former formats, in which PyTorch's distributed checkpoint (DCP) wrote the tensors.

The new checkpoint is written next to the old one under a temporary name, read back and verified. Then the old one is
renamed, the new one gets its name, and the old one is removed. Tensors pass through memory in blocks.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ...engine.errors import UserError
from ...engine.files.atomic import sync_path, sync_tree, temporary_path
from ...engine.files.disk_space import require_space
from ...engine.files.lock import run_folder_lock
from ...engine.files.removal import remove_tree
from ...engine.weights.block_copy import copy_files
from ...engine.weights.checkpoint.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest, read_manifest, write_manifest
from ...engine.weights.checkpoint.tensors import open_tensors
from ...engine.weights.checkpoint.verify import require_undamaged
from ...engine.weights.conversion.checkpoint_files import CheckpointPlan
from ...engine.weights.conversion.writing import progress
from ...engine.weights.damage import METADATA_FILE
from ...engine.weights.workers import default_workers
from .verification import checkpoints_of

OLD = ".old-format"
"""Ending of the name of a checkpoint that is being replaced."""


def upgrade(path: Path, say: Callable[[str], None] = print) -> None:
    """Rewrite the checkpoint ``path``, or every one of the run ``path``, unless it is of the present format already.

    Raises:
        UserError: it is no checkpoint or run, is damaged, a run is writing to it, or the disk cannot take the new one.
            The old checkpoint is then as it was.
    """
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path.absolute().parent
    try:
        is_run = inside.name == "checkpoints"
        lock: AbstractContextManager[list[str]] = run_folder_lock(inside.parent) if is_run else nullcontext([])
        with lock as notes:
            for line in [*notes, *_finish(inside)]:
                say(line)
            for folder in checkpoints_of(path):
                say(_upgrade(folder))
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None


def _finish(folder: Path) -> list[str]:
    """Complete killed upgrades in ``folder``: a replaced checkpoint goes, one without a successor returns."""
    lines = []
    for old in sorted(folder.glob(f"*{OLD}")):
        name = old.with_name(old.name.removesuffix(OLD))
        if name.exists():
            remove_tree(old)
            lines.append(f"removed {old}, which {name.name} has replaced")
        else:
            old.rename(name)
            lines.append(f"{old} renamed to {name}: an upgrade was interrupted")
    return lines


def _upgrade(folder: Path) -> str:
    """Rewrite one checkpoint; return a line about it."""
    manifest = read_manifest(folder)
    if manifest.format_version == FORMAT_VERSION:
        return f"{folder}: already in the current format"
    if folder.is_symlink():
        raise UserError(f"{folder}: a link; name the folder that it leads to, {folder.resolve()}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    remedy = "free some space: the old checkpoint is removed only when it is replaced"
    require_space(folder.parent, size, "the new checkpoint", lambda: remedy)
    temporary, old = temporary_path(folder), folder.with_name(folder.name + OLD)
    try:
        temporary.mkdir()
        _rewrite(folder, manifest, temporary)
        folder.rename(old)
        temporary.rename(folder)
        sync_path(folder.parent)
    finally:
        remove_tree(temporary)
    problems = remove_tree(old)
    return f"{folder}: upgraded" + (f"; {old} could not be removed: {problems[0]}" if problems else "")


def _rewrite(folder: Path, manifest: Manifest, target: Path) -> None:
    """Write the checkpoint ``folder`` into ``target`` in the present format; both are verified."""
    workers = default_workers()
    stored = open_tensors(folder)
    stored.require_full_coverage()
    plan, num_bytes = CheckpointPlan(stored.tensors), sum(tensor.num_bytes for tensor in stored.tensors.values())
    # What was stored is read once more to verify it, and what is written is read back and verified.
    with progress(f"upgrading {folder.name}", 4 * num_bytes) as advance:
        require_undamaged(folder, advance, workers)
        done = copy_files(target, plan.files, stored, workers, on_bytes=advance, nonfinite_remedy=None)
        plan.write_table(target, done.values())
        for file in (path for path in folder.rglob("*") if path.is_file() and not _is_replaced(path.name)):
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        renewed = dataclasses.replace(manifest, format_version=FORMAT_VERSION)
        write_manifest(target, renewed, {file.name: file.record for file in done.values()})
        sync_tree(target)
        require_undamaged(target, advance, workers)


def _is_replaced(name: str) -> bool:
    return name in (MANIFEST_FILE, METADATA_FILE) or name.endswith(".distcp")
