"""Going back before a loss spike, and around the samples that led to it.

The run takes up a checkpoint that is some steps older than the spike: weights, states, step, tokens and learning rate
are as they were there. The place in the data is not: all samples since then, those of the spike included, are passed
over. So did PaLM (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section 5.1): a restart some 100 steps
before the spike, 200 to 500 batches skipped.

Two things are written: new names for the checkpoints in between, and metrics.jsonl without the records since. A run
that is killed before its next checkpoint therefore comes to the same spike again, and goes back again, to the same
place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .budget import BatchPlan
from .checkpoint.changes import require_allowed
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.store import CheckpointStore
from .config import RunConfig, to_dict
from .data.sample_order import SampleOrder
from .errors import UserError
from .health import Health
from .run_state import Progress


@dataclass(frozen=True)
class Rewind:
    """Where a run goes back to."""

    checkpoint: Path
    manifest: Manifest
    """Of the checkpoint."""
    progress: Progress
    """To go on from: that of the checkpoint, but for the samples."""
    health: dict[str, Any]
    """To be restored: that of the checkpoint, and all rewinds so far, this one included."""
    line: str
    """For the log."""


def plan_rewind(
    config: RunConfig,
    store: CheckpointStore,
    health: Health,
    progress: Progress,
    order: SampleOrder,
    plan: BatchPlan,
    say: Callable[[str], None],
) -> Rewind | None:
    """Where to go back to after the spike in the last step of ``progress``. All ranks must call this.

    Returns:
        the same on all ranks; None where the run cannot go back, which ``say`` is told.

    Raises:
        UserError: it has gone back too often.
    """
    health.require_rewind(progress.step)
    training = config.training
    target = store.newest_until(progress.step - training.rewind_steps)
    if target is None:
        say(f"  not rewound, only skipped: no checkpoint is training.rewind_steps {training.rewind_steps} steps older")
        return None
    manifest = store.ranks.everywhere(lambda: read_manifest(target))
    if obstacle := _obstacle(manifest, target, config, progress, order, plan):
        say(f"  not rewound, only skipped: {obstacle}")
        return None
    skipped = progress.samples - manifest.consumed_samples
    rewinds = [*health.rewinds, {"step": progress.step, "to_step": manifest.step, "samples": skipped}]
    return Rewind(
        target,
        manifest,
        Progress(manifest.step, progress.samples, manifest.consumed_tokens, manifest.best),
        {**manifest.health, "rewinds": rewinds},
        f"  rewound to step {manifest.step} ({target}): the {skipped:,} samples from there to the spike in step "
        f"{progress.step} are passed over; rewind {len(rewinds)} of training.max_rewinds {training.max_rewinds}",
    )


def _obstacle(
    manifest: Manifest, target: Path, config: RunConfig, progress: Progress, order: SampleOrder, plan: BatchPlan
) -> str | None:
    """Why the run cannot go on from the checkpoint ``target`` and from behind the samples of ``progress``."""
    try:
        require_allowed(manifest, to_dict(config), (), target)
    except UserError:
        return f"{target} is from before the order of the data changed"
    # A blend that was changed takes over at a sample; one that was not keeps the place where it took over.
    if order.schedule.start > manifest.consumed_samples:
        return f"{target} is from before the order of the data changed"
    start = config.optimizer.schedule_start_tokens
    if manifest.consumed_tokens < start:
        return f"{target} is from before optimizer.schedule_start_tokens {start:,}"
    remaining = plan.steps_for(max(0, config.training.train_tokens - manifest.consumed_tokens))
    try:
        order.require(progress.samples + remaining * plan.global_batch_size)
    except UserError as error:
        return f"without the samples in between, {error}"
    return None
