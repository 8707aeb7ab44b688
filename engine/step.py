"""Make one optimizer step: accumulate gradients over micro-batches, clip, update.

Pretraining, the dry run of tools/plan.py, the benchmarks and the tests call :func:`train_step`. It does not know data,
checkpoints and logs; the caller counts the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .batch import Batch
from .optim import allocate_states, clip_grad_norm, set_learning_rate, step_unless
from .parallel.forward_backward import ForwardBackward, ModelParts


@dataclass(frozen=True)
class StepResult:
    """The result of a step on the device; reading it waits for the device."""

    loss: Tensor
    """[] fp32, this rank's part of the mean loss over the global batch; NaN without targets."""
    grad_norm: Tensor
    """[] fp32, before clipping; not finite on all ranks if the loss of any rank is not finite, or without targets."""
    learning_rate: float
    has_targets: bool = True
    """False if no rank had a token to predict. Then nothing was computed and nothing has changed."""


class StepGuards(Protocol):
    """Watches a step. Every rank calls the same methods in the same order."""

    def begin_phase(self, phase: str) -> None:
        """Note that a phase begins: data, forward, backward, optimizer or other."""

    def should_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return [] fp32 on the device: 1 to skip the update, else 0; the same on every rank.

        Args:
            loss: [] this rank's part of the mean loss.
            grad_norm: [] of all ranks, not finite if the loss of any rank is not finite.
        """

    def before_update(self) -> None:
        """Note that weights and optimizer states are about to change."""

    def without_targets(self) -> None:
        """Note that no rank has a token to predict in this step."""


class Unguarded:
    """Skips non-finite updates, and watches nothing else."""

    def begin_phase(self, phase: str) -> None:
        """See :class:`StepGuards`."""

    def should_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """See :class:`StepGuards`."""
        return (~grad_norm.isfinite()).float()

    def before_update(self) -> None:
        """See :class:`StepGuards`."""

    def without_targets(self) -> None:
        """See :class:`StepGuards`."""


def train_step(
    model: ModelParts,
    forward_backward: ForwardBackward,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    num_targets: float,
    learning_rate: float,
    clip: float,
    guards: StepGuards,
) -> StepResult:
    """Make one optimizer step. All ranks must call this.

    Without a target on any rank nothing is computed, and weights and optimizer states do not change.

    Args:
        model: this rank's part.
        forward_backward: computes losses and gradients of ``model``.
        optimizer: of the parameters of ``model``.
        micro_batches: of this rank.
        num_targets: number of targets in the global batch, over all ranks.
        learning_rate: of this step.
        clip: global gradient norm above which gradients are scaled down; 0 turns clipping off.
        guards: watch the step, and decide whether to skip its update.
    """
    if num_targets > 0:
        loss = forward_backward.train(micro_batches, num_targets, guards.begin_phase)
        guards.begin_phase("optimizer")
        grad_norm = clip_grad_norm(model.parameters(), clip, model.unique_parameters(), loss)
        set_learning_rate(optimizer, learning_rate)
        guards.before_update()
        step_unless(optimizer, guards.should_skip(loss, grad_norm))
        optimizer.zero_grad(set_to_none=True)
    else:
        loss = grad_norm = torch.full((), math.nan)
        guards.without_targets()
        allocate_states(optimizer)  # a checkpoint needs them even before the first update
    guards.begin_phase("other")
    return StepResult(loss, grad_norm, learning_rate, num_targets > 0)
