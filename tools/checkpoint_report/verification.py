"""Verify every byte of checkpoints against their hashes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ...engine.errors import UserError
from ...engine.files.disk_space import format_bytes
from ...engine.weights.checkpoint.manifest import MANIFEST_FILE
from ...engine.weights.checkpoint.names import named_checkpoints
from ...engine.weights.checkpoint.verify import find_damage


def verify(paths: Sequence[Path], say: Callable[[str], None] = print) -> bool:
    """Verify every checkpoint of ``paths``, each a checkpoint or a run folder; return whether all are intact.

    Raises:
        UserError: a path is neither, or cannot be read.
    """
    intact = True
    for folder in [folder for path in paths for folder in checkpoints_of(path)]:
        files = [file for file in folder.rglob("*") if file.is_file()]
        with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, disable=None,
                  leave=False, desc=folder.name) as bar:  # fmt: skip
            manifest, damage = find_damage(folder, on_bytes=bar.update)
        for item in damage:
            say(f"damaged: {item.what}")
        if manifest is not None and not damage:
            size = sum(record.bytes for record in manifest.records.values())
            verified = f"{len(manifest.files)} files, {format_bytes(size)}: unchanged since they were written"
            if manifest.base:
                verified += f"; an adapter for {manifest.base['folder']}, which is not verified"
            say(f"{folder}: " + (verified if manifest.files else "not verified: written before manifests had hashes"))
        intact = intact and manifest is not None and not damage
    return intact


def checkpoints_of(path: Path) -> list[Path]:
    """Return ``path`` if it is a checkpoint, else the checkpoints of the run ``path``.

    Raises:
        UserError: it is neither.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a checkpoint or a run folder")
    inside = path / "checkpoints"
    if (path / MANIFEST_FILE).is_file() or not inside.is_dir():
        return [path]
    found = named_checkpoints(inside)
    if not found:
        raise UserError(f"{path}: holds no checkpoints")
    return found
