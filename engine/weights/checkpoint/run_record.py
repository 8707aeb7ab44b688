"""Read and write ``run.json``: whether a run has written checkpoints, and from which checkpoint it began.

Checkpoints may be on a disk of their own, behind a link. If that disk is not mounted, their folder looks like that of a
new run. With this record, next to the curve, a run folder with a history is never treated as new.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...config.budget import recorded_budget
from ...config.yaml_loader import load_yaml
from ...errors import UserError
from ...files.atomic import replace_file
from ...files.hashing import hash_file
from ...files.lock import LOCK_FILE
from ...observe.curves import METRICS_FILE, last_record
from .manifest import MANIFEST_FILE

RECORD_FILE = "run.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Origin:
    """The checkpoint from which the run began, named by ``resume: PATH``."""

    path: str
    """Real path."""
    step: int
    manifest: str
    """Hash of its manifest, which identifies the checkpoint under any path."""


@dataclass(frozen=True)
class RunRecord:
    """The content of ``run.json``."""

    began_at: Origin | None = None
    newest_step: int | None = None
    """Step of the last checkpoint that the run has written; None before the first."""
    checkpoints: str = ""
    """Real path of the folder that the checkpoint was written to."""

    def write(self, run_folder: Path) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        replace_file(run_folder / RECORD_FILE, [(json.dumps(asdict(self), indent=2) + "\n").encode()])

    @classmethod
    def read(cls, run_folder: Path) -> RunRecord | None:
        """Return the record of the run in ``run_folder``; None if it is missing or cannot be read."""
        try:
            content: Any = json.loads((run_folder / RECORD_FILE).read_text(encoding="utf-8"))
            origin = content["began_at"]
            record = cls(origin and Origin(**origin), content["newest_step"], str(content["checkpoints"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        steps = [record.newest_step, record.began_at.step if record.began_at else None]
        return record if all(step is None or type(step) is int for step in steps) else None


def require_record_files(run_folder: Path) -> None:
    """Refuse a folder, FIFO or device in the place of a file that the run reads and writes, before any is opened.

    Opening a FIFO blocks, and reading a device may not end.

    Raises:
        UserError: names it.
    """
    for path in (run_folder / name for name in (METRICS_FILE, CONFIG_FILE, RECORD_FILE, LOCK_FILE)):
        if os.path.exists(path) and not path.is_file():
            raise UserError(
                f"{path}: not a regular file, where the run keeps one; move it away, or choose another run_folder"
            )


def note_checkpoint(run_folder: Path, step: int) -> None:
    """Record that the checkpoint of ``step`` is complete. An error is ignored: the checkpoint is valid anyway."""
    with suppress(OSError):
        record = RunRecord.read(run_folder) or RunRecord()
        replace(record, newest_step=step, checkpoints=_checkpoint_folder(run_folder)).write(run_folder)


def note_start(run_folder: Path, fresh: bool, origin: Origin | None) -> None:
    """Record how a run has started.

    Args:
        run_folder: an existing folder.
        fresh: whether it begins at step 0. Then a former record is dropped.
        origin: the checkpoint of ``resume: PATH``, if the run continues from it.
    """
    record = (None if fresh else RunRecord.read(run_folder)) or RunRecord(checkpoints=_checkpoint_folder(run_folder))
    (replace(record, began_at=origin) if origin else record).write(run_folder)


def origin_of(checkpoint: Path, step: int) -> Origin:
    """Return what identifies the complete ``checkpoint``."""
    return Origin(os.path.realpath(checkpoint), step, _manifest_hash(checkpoint))


def began_at(run_folder: Path, own: list[Path], named: str) -> int | None:
    """Return the step at which a run began, if it began at the checkpoint ``named``; else None.

    Either the path or the manifest must be the same. Without a record, the setting ``resume`` in the manifests of the
    run's checkpoints is used.

    Args:
        run_folder: of the run.
        own: the checkpoints that it has written.
        named: path of a checkpoint.
    """
    record = RunRecord.read(run_folder)
    if record is None:
        same = any(_same_path(setting, named) for setting in map(_resume_setting, own) if setting)
        return _step_in_name(named) if same else None
    origin = record.began_at
    if origin is None:
        return None
    same = _same_path(origin.path, named) or _manifest_hash(Path(named)) == origin.manifest != ""
    return origin.step if same else None


def require_no_lost_checkpoints(run_folder: Path, resume: str) -> None:
    """Refuse to begin in a run folder without checkpoints if the run has written some.

    Raises:
        UserError: names what was found, and the remedy.
    """
    found = [name for name in (RECORD_FILE, METRICS_FILE, CONFIG_FILE) if (run_folder / name).is_file()]
    record = RunRecord.read(run_folder)
    if record is not None:
        lost = record.newest_step is not None
        what = f"the run has written checkpoints up to step {record.newest_step} in {record.checkpoints}"
    else:
        last = last_record(run_folder)
        lost = last is not None and _has_saved(run_folder, last)
        what = f"its recorded curve reaches step {last['step'] if last else 0}"
    if lost:
        over = "or, to start over, resume: none" if resume == "auto" else "or start over with resume: none"
        raise UserError(
            f"run_folder {run_folder}: {what} ({', '.join(found)}), but {_what_is_there(run_folder)}; mount the disk "
            f"or put the checkpoints back, or choose another run_folder, {over} (the old curve is kept)"
        )


def _what_is_there(run_folder: Path) -> str:
    folder = run_folder / "checkpoints"
    if folder.is_symlink() and not folder.exists():
        return f"{folder} is a link to {os.readlink(folder)}, which does not exist"
    return f"{folder} {'holds none of them' if folder.is_dir() else 'does not exist'}"


def _has_saved(run_folder: Path, last: Mapping[str, Any]) -> bool:
    """Return whether a run without a record must have written a checkpoint, given the ``last`` record of its curve."""
    try:
        content: Any = load_yaml((run_folder / CONFIG_FILE).read_text(encoding="utf-8"))
        interval, budget = content["checkpoint"]["save_interval"], recorded_budget(content["training"])
        return bool(last["step"] >= interval or last["tokens"] >= budget)
    except Exception:  # missing or invalid, but some run has recorded that curve
        return True


def _checkpoint_folder(run_folder: Path) -> str:
    return os.path.realpath(run_folder / "checkpoints")


def _manifest_hash(checkpoint: Path) -> str:
    """Return the hash of the manifest's bytes; empty if it cannot be read."""
    try:
        return hash_file(checkpoint / MANIFEST_FILE)
    except OSError:
        return ""


def _resume_setting(checkpoint: Path) -> str | None:
    try:
        setting = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))["config"]["resume"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return setting if isinstance(setting, str) and setting not in ("auto", "none") else None


def _same_path(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _step_in_name(checkpoint: str) -> int:
    digits = re.search(r"(\d+)/*$", checkpoint)
    return int(digits[1]) if digits else 0
