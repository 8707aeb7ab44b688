"""Decide which checkpoints of a run are kept, as a function of their manifests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config.settings import CheckpointConfig
from ...errors import UserError
from .manifest import Manifest, read_manifest
from .verify import wrong_sizes


def intact_checkpoints(folders: list[Path]) -> dict[Path, Manifest]:
    """Return the checkpoints whose manifest is valid and whose files have the right sizes, with their manifests."""
    whole = {}
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            if not wrong_sizes(folder, manifest):
                whole[folder] = manifest
        except UserError:
            continue  # Neither counted nor removed: the user may want to look at it.
    return whole


def reasons_to_keep(
    manifests: Mapping[Path, Manifest], keep_last: int, keep_every: int, best_step: int | None, rewind_steps: int = 0
) -> dict[Path, list[str]]:
    """Return why each checkpoint is kept: last, every, best, rewind, final, emergency. An empty list means not kept.

    An emergency checkpoint does not count as one of the ``keep_last``. It is kept until an ordinary one is newer.
    "final" applies to the newest only: if the token budget was raised later, the former last checkpoint is ordinary.

    Args:
        manifests: by folder, oldest first.
        keep_last: number of newest ones to keep.
        keep_every: keep those whose step is a multiple of it; 0: this rule is off.
        best_step: step of the best evaluation; None: it is not kept. If its checkpoint is missing, as after a failed
            save, the newest one that was the best when it was written is kept instead.
        rewind_steps: minimum number of steps that a rollback after a loss spike goes back; 0: there are no rollbacks.
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
    """Return the reasons for ``tools/checkpoint.py prune``, where the newest manifest names the best step."""
    best = list(manifests.values())[-1].best.get("step") if manifests else None
    return reasons_to_keep(manifests, keep_last, keep_every, best)


def _steps_for_rewind(steps: Sequence[int], rewind_steps: int) -> list[int]:
    """Return, of ascending ``steps``, the newest that is old enough for a rollback, and the next one.

    The second will replace the first. Without it, all younger ones could be removed before they are old enough, and the
    first would be kept forever.
    """
    enough = [step for step in steps if step <= steps[-1] - rewind_steps]
    return enough[-1:] + list(steps[len(enough) : len(enough) + 1])


def describe_rule(config: CheckpointConfig, eval_interval: int | str, first_set: str | None, rewind_steps: int) -> str:
    """Return a line for the log about the checkpoints that a run keeps.

    Args:
        config: of the run.
        eval_interval: steps between evaluations, or epoch; 0: only at the end.
        first_set: name of the validation set that determines the best; None without validation sets.
        rewind_steps: see :func:`reasons_to_keep`.
    """
    parts = [f"the newest {config.keep_last}" if config.keep_last > 1 else "the newest"]
    if config.keep_every:
        parts.append(f"those at multiples of {config.keep_every:,} steps")
    if first_set is not None and config.keep_best == "improved":
        parts.append(f"the best by {first_set}, saved after every evaluation with a new lowest loss")
    elif first_set is not None and config.keep_best:
        when = _both_due(config.save_interval, eval_interval)
        parts.append(f"the best by {first_set} among the checkpoints saved at an evaluation ({when})")
    if rewind_steps:
        parts.append(f"one that is {rewind_steps:,} steps older, for a rewind")
    return f"keeps       {', '.join(parts)}"


def _both_due(save_interval: int | str, eval_interval: int | str) -> str:
    """Return in words when a run both saves and evaluates."""
    if not eval_interval:
        return "only at the end"
    if isinstance(save_interval, str) or isinstance(eval_interval, str):
        same = save_interval == eval_interval
        return "every epoch and at the end" if same else "where both fall on one step, and at the end"
    return f"every {math.lcm(save_interval, eval_interval):,} steps and at the end"
