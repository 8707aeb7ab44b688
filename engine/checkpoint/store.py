"""The checkpoints of a run: written under a temporary name, renamed when complete, found again, thinned out.

``{run_folder}/checkpoints/step-00001000/`` exists only when complete and is never written again.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..parallel.process_group import Ranks
from .assets import ASSET_FOLDER, HfAssets
from .manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from .tensors import save_tensors

_COMPLETE = re.compile(r"^step-(\d{8,})$")
_TEMPORARY = re.compile(r"^\.step-\d{8,}\.[0-9a-f]{32}\.tmp$")


class CheckpointStore:
    """The folder ``{run_folder}/checkpoints``."""

    def __init__(self, run_folder: str | Path, ranks: Ranks, keep_last: int, keep_best: bool):
        self.folder = Path(run_folder) / "checkpoints"
        self.ranks = ranks
        self.keep_last = keep_last
        self.keep_best = keep_best

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = {
            int(match[1]): entry
            for entry in self.folder.iterdir()
            if (match := _COMPLETE.match(entry.name)) and (entry / MANIFEST_FILE).is_file()
        }
        return [found[step] for step in sorted(found)]

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint that ``resume`` (auto, none or a path) means; None to start fresh.

        Raises:
            UserError: a named checkpoint is missing, or the run would mix with another one in this folder.
        """
        if resume == "auto":
            complete = self.complete()
            if not complete and (broken := sorted(self.folder.glob("step-*"))):
                raise UserError(
                    f"{broken[-1]}: {MANIFEST_FILE} is missing, so it cannot be resumed, and there is no other one; "
                    "move it away to start from the beginning, or choose another run_folder"
                )
            return complete[-1] if complete else None
        if resume == "none":
            if self.complete():
                raise UserError(
                    f"resume is none, but {self.folder} holds checkpoints; choose another run_folder or resume: auto"
                )
            return None
        manifest = read_manifest(resume)
        if manifest.kind != "training":
            raise UserError(f"resume {resume}: it holds weights only; start from it with model.initialize_from")
        for newer in (path for path in self.complete() if read_manifest(path).step > manifest.step):
            raise UserError(
                f"resume {resume} is at step {manifest.step}, but {newer} is newer: to go on from there set resume to "
                "auto, to go back choose another run_folder or move the newer checkpoints away"
            )
        return Path(resume)

    def save(self, tensors: dict[str, Tensor], assets: HfAssets, manifest: Manifest) -> Path:
        """Write one checkpoint with all ranks and make it visible when every byte is on disk.

        Raises:
            UserError: on every rank, when any of them cannot write. Nothing is left behind.
        """
        final = self.folder / f"step-{manifest.step:08d}"
        temporary = self.ranks.share(self._temporary_name(final))
        self.ranks.on_main(lambda: self._begin(temporary, final))
        try:
            self.ranks.everywhere(lambda: self._require_visible(temporary))
            save_tensors(temporary, tensors)
            self.ranks.on_main(lambda: self._publish(temporary, final, assets, manifest))
        except BaseException:
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def _temporary_name(self, checkpoint: Path) -> Path:
        return self.folder / f".{checkpoint.name}.{uuid.uuid4().hex}.tmp"

    def _begin(self, temporary: Path, final: Path) -> None:
        if final.exists():
            raise UserError(f"{final}: exists already, and checkpoints are never overwritten; move it away")
        temporary.mkdir(parents=True)

    def _require_visible(self, temporary: Path) -> None:
        # DCP makes the folder wherever it is missing: without this check, nodes that share no file system would each
        # keep their own shards, and the checkpoint would be complete on none.
        if not temporary.is_dir():
            raise UserError(
                f"{temporary}: made by rank 0 but not seen here; put run_folder on a file system that all nodes share"
            )

    def _publish(self, temporary: Path, final: Path, assets: HfAssets, manifest: Manifest) -> None:
        assets.write(temporary / ASSET_FOLDER)
        write_manifest(temporary, manifest)
        sync_tree(temporary)
        temporary.rename(final)
        sync_path(self.folder)

    def thin_out(self, best_step: int | None) -> None:
        """Remove all but the newest ``keep_last`` checkpoints and the best one."""
        self.ranks.on_main(lambda: self._thin_out(best_step))

    def _thin_out(self, best_step: int | None) -> None:
        for checkpoint in self.complete()[: -self.keep_last]:
            if not (self.keep_best and best_step == int(checkpoint.name.removeprefix("step-"))):
                # Renamed first: killed half-way, this leaves a leftover and not half a checkpoint.
                trash = checkpoint.rename(self._temporary_name(checkpoint))
                shutil.rmtree(trash)

    def remove_leftovers(self) -> list[Path]:
        """Remove what killed runs left half-written or half-removed; returns it, on the main rank."""
        return self.ranks.on_main(self._remove_leftovers) or []

    def _remove_leftovers(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        leftovers = [entry for entry in self.folder.iterdir() if _TEMPORARY.match(entry.name)]
        for entry in leftovers:
            shutil.rmtree(entry)
        return leftovers


def sync_tree(folder: Path) -> None:
    """Flush every file and directory below ``folder`` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(root) / name)
        sync_path(Path(root))


def sync_path(path: Path) -> None:
    """Flush one file, or the names in one directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
