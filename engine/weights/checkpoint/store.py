"""Write, find, verify, quarantine and prune the checkpoints of a run.

``{run_folder}/checkpoints/step-00001000/`` is written under a temporary name, renamed when it is complete, and never
changed again. Before a checkpoint is used, all of its files are compared with the hashes in its manifest. A damaged
checkpoint is quarantined: it is renamed and no longer used.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from ...errors import UserError
from ...files.atomic import sync_path, sync_tree, temporary_path
from ...files.disk_space import describe_pruning, describe_space, free_bytes, is_about_space
from ...files.hashing import FileRecord
from ...files.lock import run_folder_lock
from ...files.removal import remove_tree
from ...parallel.process_group import Ranks
from ..saving import save_tensors
from .assets import ASSET_FOLDER, HfAssets
from .manifest import MANIFEST_FILE, Manifest, code_versions, read_manifest, write_manifest
from .names import (
    DAMAGED,
    REWOUND,
    checkpoint_name,
    complete_checkpoints,
    named_checkpoints,
    require_no_broken_link,
    step_of,
)
from .retention import intact_checkpoints, reasons_to_keep, reasons_when_pruning
from .run_record import (
    Origin,
    RunRecord,
    began_at,
    note_checkpoint,
    origin_of,
    require_no_lost_checkpoints,
    require_record_files,
)
from .verify_ranks import verify_together

_TEMPORARY = re.compile(r"^\.step-\d{8,}\.[0-9a-f]{32}\.tmp$")


class CheckpointStore:
    """The folder ``{run_folder}/checkpoints``."""

    def __init__(
        self,
        run_folder: str | Path,
        ranks: Ranks,
        keep_last: int,
        keep_best: bool,
        keep_every: int = 0,
        rewind_steps: int = 0,
    ):
        self.folder = Path(run_folder) / "checkpoints"
        self.ranks = ranks
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every
        self.rewind_steps = rewind_steps
        self.expected_bytes = 0
        """Estimated size of a checkpoint; 0: unknown."""
        self.origin: Origin | None = None
        """The checkpoint of ``resume: PATH``, if :meth:`resolve` chose it."""
        self._remarks: list[str] = []
        """Lines for the log about the checkpoint in use."""
        self._found: list[Path] = []
        """The checkpoints from which :meth:`resolve` chose."""
        self._damaged: list[tuple[Path, str]] = []
        """Checkpoints to :meth:`quarantine`, and their damage."""
        code_versions()

    def of(self, ranks: Ranks) -> CheckpointStore:
        """Return this store with the process group of ``ranks``."""
        store = copy.copy(self)
        store.ranks = ranks
        return store

    @contextmanager
    def locked(self) -> Iterator[list[str]]:
        """Be the only writer to the run folder; see :func:`run_folder_lock`. All ranks must call this.

        Raises:
            UserError: on every rank, if another process writes to it, or has done so since :meth:`resolve`.
        """
        with ExitStack() as stack:
            remarks = self.ranks.run_on_rank0(lambda: stack.enter_context(run_folder_lock(self.folder.parent))) or []
            self.ranks.run_on_rank0(self._require_as_found)
            yield remarks

    def _require_as_found(self) -> None:
        """Refuse to continue from a checkpoint chosen before the lock was held, if others have been written since."""
        changed = sorted({*self._found} ^ {*self._candidates()})
        if changed:
            raise UserError(
                f"{changed[-1]}: written or removed by another run while this one was starting; start again to "
                "continue from the newest checkpoint"
            )

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

    def _candidates(self) -> list[Path]:
        """Return all folders with the name of a checkpoint, oldest first."""
        return named_checkpoints(self.folder)

    def resolve(self, resume: str) -> tuple[Path, Manifest] | None:
        """Return the checkpoint for ``resume`` (auto, none or a path), verified by all ranks; None to start fresh.

        Nothing is renamed yet: damaged checkpoints are noted for :meth:`quarantine`.

        Raises:
            UserError: a named checkpoint is missing or damaged, all are damaged, or the run would mix with another one
                in this folder.
        """
        self.ranks.run_on_rank0(lambda: require_record_files(self.folder.parent))
        # The main rank decides: shared file systems may show a new folder to some nodes later than to others.
        self._found = self.ranks.broadcast(self.ranks.run_on_rank0(self._candidates))
        if resume == "auto":
            newest = self._latest_valid(self._found)
            if newest is None:
                self._require_nothing_lost(resume)
            return newest
        complete = self.ranks.broadcast(self.ranks.run_on_rank0(self.complete))
        if resume == "none":
            if complete:
                raise UserError(
                    f"resume is none, but {self.folder} holds checkpoints; choose another run_folder or resume: auto"
                )
            return None
        began = self.ranks.broadcast(self.ranks.run_on_rank0(lambda: began_at(self.folder.parent, complete, resume)))
        own = [path for path in self._found if began is not None and step_of(path) > began]
        if own:
            self._remarks.append(f"resume      the run began at {resume}, and continues from its own newest checkpoint")
            return self._latest_valid(own)
        manifest = self.require_valid(resume, "resume")
        if manifest.kind != "training":
            raise UserError(f"resume {resume}: it holds weights only; start from it with model.initialize_from")
        for newer in (path for path in complete if step_of(path) > manifest.step):
            raise UserError(
                f"resume {resume} is at step {manifest.step}, but {newer} is newer: to continue from there set resume "
                "to auto, to go back choose another run_folder or move the newer checkpoints away"
            )
        if not self._found:
            self._require_nothing_lost(resume)
        self.origin = origin_of(Path(resume), manifest.step)
        return Path(resume), manifest

    def _require_nothing_lost(self, resume: str) -> None:
        self.ranks.run_on_rank0(lambda: require_no_lost_checkpoints(self.folder.parent, resume))

    def require_valid(self, folder: str, key: str) -> Manifest:
        """Return the manifest of a checkpoint that the setting ``key`` names, verified by all ranks. It is not renamed.

        Raises:
            UserError: on every rank, if it is missing or damaged.
        """
        self.ranks.fail_together(lambda: read_manifest(folder))
        manifest, problem = self._examine(Path(folder))
        if manifest is None or problem:
            raise UserError(f"{problem}; name another checkpoint in {key}")
        return manifest

    def _latest_valid(self, candidates: list[Path]) -> tuple[Path, Manifest] | None:
        for folder in reversed(candidates):
            manifest, problem = self._examine(folder)
            if manifest is not None and manifest.step != step_of(folder):
                problem = f"{folder}: its manifest is of step {manifest.step}"
            if manifest is not None and problem is None:
                self.ranks.run_on_rank0(partial(require_no_broken_link, self.folder, manifest.step + 1))
                self._remarks += self.ranks.run_on_rank0(partial(self._newer_ones_lost, manifest.step)) or []
                return folder, manifest
            self._damaged.append((folder, problem or ""))
        self.ranks.run_on_rank0(lambda: require_no_broken_link(self.folder))
        former = self._damaged[0][1] if self._damaged else next(map(str, sorted(self.folder.glob("step-*"))), None)
        if former := self.ranks.broadcast(former):
            raise UserError(
                f"{former}, and {self.folder} holds no other checkpoint that can be resumed; put one "
                "back, or move these away to start from the beginning, or choose another run_folder"
            )
        return None

    def _newer_ones_lost(self, step: int) -> list[str]:
        """Return a line if checkpoints after ``step`` are gone, and not because this program renamed them."""
        record = RunRecord.read(self.folder.parent)
        newest = record.newest_step if record else None
        if newest is None or newest <= step or any(self.folder.glob(f"{checkpoint_name(newest)}*")):
            return []
        return [
            f"note: the run has written a checkpoint of step {newest:,}, which is no longer in {self.folder}; it "
            f"continues from step {step:,}"
        ]

    def _examine(self, folder: Path) -> tuple[Manifest | None, str | None]:
        """Return the manifest of ``folder`` and its first damage. Every rank reads a share of the files."""
        manifest, problem = verify_together(folder, self.ranks)
        if manifest is not None and not manifest.files:
            self._remarks.append(f"{folder} is not verified: it was written before manifests had hashes")
        return manifest, problem

    def quarantine(self) -> list[str]:
        """Rename the checkpoints that :meth:`resolve` found damaged; return lines for the log, on the main rank."""
        return (self.ranks.run_on_rank0(self._quarantine) or []) + self._remarks

    def _quarantine(self) -> list[str]:
        lines = []
        for folder, problem in self._damaged:
            lines.append(f"quarantined {problem}; renamed to {_renamed(folder, DAMAGED)}")
        self._damaged.clear()
        return lines

    def latest_valid_until(self, step: int) -> Path | None:
        """Return the newest undamaged checkpoint of at most ``step`` steps, verified by all ranks."""
        for folder in reversed(self.ranks.broadcast(self.ranks.run_on_rank0(self._candidates))):
            if step_of(folder) <= step:
                manifest, problem = self._examine(folder)
                if manifest is not None and problem is None:
                    return folder
        return None

    def discard_after(self, step: int) -> list[str]:
        """Rename all checkpoints of more than ``step`` steps, after a rollback to ``step``.

        Returns:
            Lines for the log, on the main rank.
        """
        return self.ranks.run_on_rank0(lambda: self._discard_after(step)) or []

    def _discard_after(self, step: int) -> list[str]:
        # The newest first: if the run is killed now, it continues from the newest that is left, comes to the spike
        # again, and rolls back again.
        newer = [folder for folder in reversed(self._candidates()) if step_of(folder) > step]
        note_checkpoint(self.folder.parent, step)
        return [f"  {folder} renamed to {_renamed(folder, REWOUND)}: the run rolls back" for folder in newer]

    def save(
        self,
        tensors: Mapping[str, Tensor],
        assets: HfAssets,
        manifest: Manifest,
        staged: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write a checkpoint with all ranks, and rename it when every byte is on the disk.

        Args:
            tensors: every tensor by name.
            assets: Hugging Face files of the checkpoint.
            manifest: of the checkpoint.
            staged: see :func:`save_tensors`.

        Raises:
            UserError: on every rank, if any of them cannot write. Nothing is left behind.
        """
        final = self.folder / checkpoint_name(manifest.step)
        temporary = self.ranks.broadcast(temporary_path(final))
        self.ranks.run_on_rank0(lambda: self._begin(temporary, final))
        try:
            self.ranks.fail_together(lambda: require_visible(temporary))
            records = self.ranks.all_gather(save_tensors(temporary, tensors, staged, self.ranks.group))
            hashed = {name: record for of_rank in records for name, record in of_rank.items()}
            self.ranks.run_on_rank0(lambda: self._publish(temporary, final, assets, manifest, hashed))
        except BaseException as error:
            if self.ranks.is_main:
                remove_tree(temporary)
            if isinstance(error, UserError) and is_about_space(str(error)):
                raise UserError(f"{error}; {self._describe_full_disk()}") from None
            raise
        return final

    def _describe_full_disk(self) -> str:
        try:
            said = describe_space(self.expected_bytes, free_bytes(self.folder), "a checkpoint")
            return f"{said}; {self.describe_pruning()}"
        except OSError:  # the disk is not only full
            return "no space left for a checkpoint"

    def describe_pruning(self) -> str:
        """Return the command that makes space on the disk of the checkpoints."""
        whole = intact_checkpoints(self.complete())
        reasons = reasons_when_pruning(whole, 1, self.keep_every)
        removable = [folder for folder, why in reasons.items() if not why]
        return describe_pruning(self.folder.parent, removable, self.keep_every)

    def _begin(self, temporary: Path, final: Path) -> None:
        if final.exists():
            raise UserError(f"{final}: exists already, and checkpoints are never overwritten; move it away")
        temporary.mkdir(parents=True)

    def _publish(
        self, temporary: Path, final: Path, assets: HfAssets, manifest: Manifest, hashed: dict[str, FileRecord]
    ) -> None:
        assets.write(temporary / ASSET_FOLDER)
        sync_tree(temporary)
        write_manifest(temporary, manifest, hashed)
        sync_path(temporary / MANIFEST_FILE)
        sync_path(temporary)
        temporary.rename(final)
        note_checkpoint(self.folder.parent, manifest.step)
        sync_path(self.folder)
        sync_path(self.folder.parent)  # the first checkpoint has created self.folder in it

    def prune(self, best_step: int | None) -> list[str]:
        """Remove the checkpoints without :func:`reasons_to_keep`, except damaged ones.

        Returns:
            Lines about files that could not be removed, on the main rank.
        """
        return self.ranks.run_on_rank0(lambda: self._prune(best_step)) or []

    def _prune(self, best_step: int | None) -> list[str]:
        whole = intact_checkpoints(self.complete())
        best_step = best_step if self.keep_best else None
        reasons = reasons_to_keep(whole, self.keep_last, self.keep_every, best_step, self.rewind_steps)
        problems = [problem for folder, why in reasons.items() if not why for problem in self.remove(folder)]
        return [_not_removed("an older checkpoint", problems)] if problems else []

    def remove(self, checkpoint: Path) -> list[str]:
        """Remove one checkpoint. For a link, only the link is removed.

        Returns:
            Full path and reason for each file that could not be removed.
        """
        if checkpoint.is_symlink():
            return remove_tree(checkpoint)
        # Renamed first: if killed now, this leaves a temporary folder and not half a checkpoint.
        try:
            trash = checkpoint.rename(temporary_path(checkpoint))
        except OSError as error:
            return [f"{checkpoint.absolute()}: {error.strerror or error}"]
        return remove_tree(trash)

    def remove_leftovers(self) -> list[str]:
        """Remove the temporary folders of killed runs, as far as possible.

        Returns:
            Lines for the log, on the main rank.
        """
        return self.ranks.run_on_rank0(self._remove_leftovers) or []

    def _remove_leftovers(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        lines = []
        for entry in sorted(self.folder.iterdir()):
            if _TEMPORARY.match(entry.name) and (entry.is_symlink() or entry.is_dir()):
                problems = remove_tree(entry)
                said = f"removed {entry}, an incomplete checkpoint of a killed run"
                lines.append(_not_removed("a leftover of a killed run", problems) if problems else said)
        return lines


def require_visible(folder: Path) -> None:
    """Refuse a ``folder`` that rank 0 has created and this rank does not see.

    Raises:
        UserError: names it.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: created by rank 0 but not visible here; put run_folder on a file system that all nodes share"
        )


def _not_removed(what: str, problems: list[str]) -> str:
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"note: {what} could not be removed: {problems[0]}{more}; remove it yourself, no command reads it"


def _renamed(folder: Path, ending: str) -> Path:
    """Rename ``folder`` so that it is no longer a checkpoint of the run; return its new path."""
    target, number = folder.with_name(f"{folder.name}{ending}"), 1
    while os.path.lexists(target):
        number += 1
        target = folder.with_name(f"{folder.name}{ending}.{number}")
    folder.rename(target)
    return target
