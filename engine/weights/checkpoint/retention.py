"""Which checkpoints of a run are kept, and why: a pure function of what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config.settings import CheckpointConfig
from ...errors import UserError
from .manifest import Manifest, read_manifest
from .verify import wrong_sizes


def intact_checkpoints(folders: list[Path]) -> dict[Path, Manifest]:
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
    manifests: Mapping[Path, Manifest], keep_last: int, keep_every: int, best_step: int | None, rewind_steps: int = 0
) -> dict[Path, list[str]]:
    """Why each checkpoint is kept: last, every, best, rewind, final, emergency; those with an empty list are not.

    One that was written because a step failed does not count among the ``keep_last``: it is kept until an ordinary one
    is newer. "final" is a reason for the newest only: after a budget was raised, its last checkpoint is like any other.

    Args:
        manifests: by folder, oldest first.
        keep_last: newest ones that are kept.
        keep_every: those whose step is a multiple of it are kept; 0: none for that.
        best_step: step of the best evaluation; None where it is not kept. Where its checkpoint is missing, as after
            a save that failed, the newest one that was the best when it was written is kept for it.
        rewind_steps: steps that the run goes back at least after a loss spike; 0: it does not.
    """
    ordinary = [folder for folder, manifest in manifests.items() if not manifest.emergency]
    newest = ordinary[-keep_last:]
    last_step = manifests[ordinary[-1]].step if ordinary else -1
    steps = {manifest.step for manifest in manifests.values()}
    if best_step is not None and best_step not in steps:
        best_step = max((m.step for m in manifests.values() if m.best.get("step") == m.step), default=None)
    for_rewind = _steps_for_rewind(sorted(steps), rewind_steps) if rewind_steps else ()
    reasons: dict[Path, list[str]] = {}
    for folder, manifest in manifests.items():
        holds = {
            "last": folder in newest,
            "every": bool(keep_every) and manifest.step % keep_every == 0,
            "best": best_step is not None and manifest.step == best_step,
            "rewind": manifest.step in for_rewind,
            "final": manifest.final and folder == newest[-1],
            "emergency": bool(manifest.emergency) and manifest.step > last_step,
        }
        reasons[folder] = [reason for reason, true in holds.items() if true]
    return reasons


def reasons_when_pruning(manifests: Mapping[Path, Manifest], keep_last: int, keep_every: int) -> dict[Path, list[str]]:
    """The reasons that ``tools/checkpoint.py prune`` goes by: the newest manifest says which step is the best."""
    best = list(manifests.values())[-1].best.get("step") if manifests else None
    return reasons_to_keep(manifests, keep_last, keep_every, best)


def _steps_for_rewind(steps: Sequence[int], rewind_steps: int) -> list[int]:
    """Of ``steps``, in rising order: the newest that is old enough, and the oldest that is not yet, to follow it.

    Without the second, the first would remain for ever where all that are younger are removed before they are old
    enough. With it, the first is less than twice ``rewind_steps`` and the distance between two saves older than the
    newest.
    """
    enough = [step for step in steps if step <= steps[-1] - rewind_steps]
    return enough[-1:] + list(steps[len(enough) : len(enough) + 1])


def describe_rule(config: CheckpointConfig, eval_interval: int, first_set: str | None, rewind_steps: int) -> str:
    """Which checkpoints a run keeps, for the log.

    Args:
        config: of the run.
        eval_interval: steps between evaluations; 0: only at the end.
        first_set: name of the validation set that decides which is the best; None without validation sets.
        rewind_steps: see :func:`reasons_to_keep`.
    """
    parts = [f"the newest {config.keep_last}" if config.keep_last > 1 else "the newest"]
    if config.keep_every:
        parts.append(f"those at multiples of {config.keep_every:,} steps")
    if first_set is not None and config.keep_best == "improved":
        parts.append(f"the best by {first_set}, saved at every evaluation that is the best so far")
    elif first_set is not None and config.keep_best:
        common = math.lcm(config.save_interval, eval_interval)
        when = f"every {common:,} steps and at the end" if eval_interval else "only at the end"
        parts.append(f"the best by {first_set} of those that are saved where it is evaluated ({when})")
    if rewind_steps:
        parts.append(f"one that is {rewind_steps:,} steps old to rewind to")
    return f"keeps       {', '.join(parts)}"
