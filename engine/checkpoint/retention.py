"""Which checkpoints of a run are kept, and why: a pure function of what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .manifest import Manifest, read_manifest
from .verify import wrong_sizes


def whole_checkpoints(folders: list[Path]) -> dict[Path, Manifest]:
    """Those of ``folders`` whose manifest can be read and whose files have their sizes, with their manifests."""
    whole = {}
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            if not wrong_sizes(folder, manifest):
                whole[folder] = manifest
        except UserError:
            # Not counted, and not removed: it is somebody's to look at.
            continue
    return whole


def reasons_to_keep(
    manifests: Mapping[Path, Manifest], keep_last: int, keep_every: int, best_step: int | None
) -> dict[Path, list[str]]:
    """Why each checkpoint is kept: last, every, best, final; those with an empty list are not.

    Args:
        manifests: by folder, oldest first.
        keep_last: newest ones that are kept.
        keep_every: those whose step is a multiple of it are kept; 0: none for that.
        best_step: step of the best evaluation; None where it is not kept.
    """
    newest = list(manifests)[-keep_last:]
    reasons: dict[Path, list[str]] = {}
    for folder, manifest in manifests.items():
        holds = {
            "last": folder in newest,
            "every": bool(keep_every) and manifest.step % keep_every == 0,
            "best": best_step is not None and manifest.step == best_step,
            "final": manifest.final,
        }
        reasons[folder] = [reason for reason, true in holds.items() if true]
    return reasons
