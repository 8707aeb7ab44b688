"""Going back before a loss spike, and around the samples that led to it.

The run takes up a checkpoint that is some steps older than the spike: weights, states, step, tokens and learning rate
are as they were there. The place in the data is not: all samples since then, those of the spike included, are passed
over. So did PaLM (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section 5.1): a restart some 100 steps
before the spike, 200 to 500 batches skipped.

Nothing is written but new names for the checkpoints in between. A run that is killed before its next checkpoint
therefore comes to the same spike again, and goes back again, to the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .budget import BatchPlan
from .checkpoint.manifest import Manifest, read_manifest
from .checkpoint.store import CheckpointStore
from .config import TrainingConfig
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
    config: TrainingConfig,
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
    target = store.newest_until(progress.step - config.rewind_steps)
    if target is None:
        say(f"  not rewound, only skipped: no checkpoint is training.rewind_steps {config.rewind_steps} steps older")
        return None
    manifest = store.ranks.everywhere(lambda: read_manifest(target))
    remaining = plan.steps_for(max(0, config.train_tokens - manifest.consumed_tokens))
    try:
        order.require(progress.samples + remaining * plan.global_batch_size)
    except UserError as error:
        say(f"  not rewound, only skipped: without the samples in between, {error}")
        return None
    skipped = progress.samples - manifest.consumed_samples
    rewinds = [*health.rewinds, {"step": progress.step, "to_step": manifest.step, "samples": skipped}]
    return Rewind(
        target,
        manifest,
        Progress(manifest.step, progress.samples, manifest.consumed_tokens, manifest.best),
        {**manifest.health, "rewinds": rewinds},
        f"  rewound to step {manifest.step} ({target}): the {skipped:,} samples from there to the spike in step "
        f"{progress.step} are passed over; rewind {len(rewinds)} of training.max_rewinds {config.max_rewinds}",
    )
