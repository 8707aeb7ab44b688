"""Roll back to a checkpoint before a loss spike, and skip the samples that led to it.

The run continues from a checkpoint some steps before the spike, with its weights, optimizer states, step, tokens and
learning rate. The data position is not restored: all samples since then, including those of the spike, are skipped.
PaLM did the same (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section 5.1): it restarted about 100 steps
before the spike and skipped 200 to 500 batches.

A rollback renames the checkpoints in between and removes the later records from metrics.jsonl. A run that is killed
before its next checkpoint therefore meets the same spike again, and rolls back to the same checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.budget import TRAIN, given_key
from ..config.settings import RunConfig, to_dict
from ..data.sample_order import SampleOrder
from ..errors import UserError
from ..run import Run
from ..schedule import BatchPlan, Progress
from ..weights.checkpoint.average import load_average
from ..weights.checkpoint.manifest import Manifest, read_manifest
from ..weights.checkpoint.resume_changes import require_allowed


@dataclass(frozen=True)
class Rollback:
    """The state to which a run rolls back."""

    checkpoint: Path
    manifest: Manifest
    """Of the checkpoint."""
    progress: Progress
    """Of the checkpoint, except the number of samples."""
    health: dict[str, Any]
    """State of the step guard: of the checkpoint, with all rollbacks including this one."""
    line: str
    """For the log."""


def rollback_if_spiking(run: Run) -> Rollback | None:
    """Return the rollback if the last step was a loss spike. All ranks must call this.

    Returns:
        the same on all ranks; None without a spike, or if a rollback is impossible, which is logged.

    Raises:
        UserError: too many rollbacks.
    """
    guard, training, progress = run.guards.step_guard, run.config.training, run.progress
    if not guard.spiked or training.loss_spike_action == "skip":
        return None
    run.guards.pause_watchdog()
    run.saver.wait()  # the checkpoint being written may be the one to roll back to
    guard.require_rewinds_left(progress.step)
    target = run.store.latest_valid_until(progress.step - training.rewind_steps)
    if target is None:
        steps = training.rewind_steps
        run.say(f"  not rewound, only skipped: no checkpoint is training.rewind_steps {steps} steps older")
        return None
    manifest = run.ranks.fail_together(lambda: read_manifest(target))
    if obstacle := _obstacle(manifest, target, run.config, progress, run.order, run.plan):
        run.say(f"  not rewound, only skipped: {obstacle}")
        return None
    skipped = progress.samples - manifest.consumed_samples
    rewinds = [*guard.rewinds, {"step": progress.step, "to_step": manifest.step, "samples": skipped}]
    return Rollback(
        target,
        manifest,
        Progress(manifest.step, progress.samples, manifest.consumed_tokens, manifest.best, manifest.early_stopping),
        {**manifest.health, "rewinds": rewinds},
        f"  rewound to step {manifest.step} ({target}): the {skipped:,} samples from there to the spike in step "
        f"{progress.step} are skipped; rewind {len(rewinds)} of training.max_rewinds {training.max_rewinds}",
    )


def roll_back(run: Run, rollback: Rollback) -> None:
    """Restore everything from the checkpoint except the data position. All ranks must call this."""
    run.say(*run.store.discard_after(rollback.progress.step), rollback.line)
    start = run.start
    checkpoint, manifest = rollback.checkpoint, rollback.manifest
    earlier = run.ranks.fail_together(lambda: start.at_checkpoint(checkpoint, manifest))
    run.ranks.fail_together(lambda: earlier.load_into(run.model, run.optimizer))
    run.say(*run.ranks.fail_together(lambda: load_average(earlier.folder, earlier.resumed_tensors, run.optimizer)))
    run.progress = rollback.progress
    run.validation.continue_from(manifest)
    run.guards.step_guard.load_state_dict(rollback.health)
    run.evaluation_pending = run.must_evaluate_at(rollback.manifest)
    run.ranks.run_on_rank0(lambda: run.report.start(run.progress.step, run.evaluation_pending))


def _obstacle(
    manifest: Manifest, target: Path, config: RunConfig, progress: Progress, order: SampleOrder, plan: BatchPlan
) -> str | None:
    """Return why the run cannot continue from ``target`` with the samples after ``progress``, or None."""
    try:
        require_allowed(manifest, to_dict(config), (), target)
    except UserError:
        return f"{target} was written before the order of the data changed"
    # A mixture that has changed starts at a sample of its own; an unchanged one keeps its earlier start.
    if order.curriculum.start > manifest.consumed_samples:
        return f"{target} was written before the order of the data changed"
    start = config.optimizer.schedule_start_tokens
    if manifest.consumed_tokens < start:
        return f"{target} was written before optimizer.schedule_start_tokens {start:,}"
    remaining = plan.steps_left(config.training.budget, manifest.consumed_tokens)
    try:
        order.require(progress.samples + remaining * plan.global_batch_size, given_key(config, TRAIN))
    except UserError as error:
        return f"without the samples in between, {error}"
    return None
