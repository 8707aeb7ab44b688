"""One optimizer step, as a function: accumulate gradients over the micro-batches, clip, update.

Pretraining, the dry run of tools/plan.py, the benchmarks and the tests all call :func:`train_step`. It knows neither
data, checkpoints nor logs. The caller counts the step, also if its update is skipped. :class:`StepGuards` watch it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .batch import Batch
from .optim import TrainingOptimizer, allocate_states, clip_divisor, global_norm, set_learning_rate, step_unless
from .optim.loss_scaling import LossScaler, total_divisor, unscaled
from .parallel.forward_backward import ForwardBackward, ModelParts


@dataclass(frozen=True)
class StepResult:
    """The result of a step on the device; reading it waits for the device."""

    loss: Tensor
    """[] fp32, this rank's part of the mean loss over the global batch. Without targets it is NaN, on the CPU."""
    grad_norm: Tensor
    """[] fp32, before clipping. Not finite on any rank if one rank's loss is not finite. NaN without targets."""
    learning_rate: float
    z_loss: Tensor | None = None
    """[] fp32, this rank's part of the mean of ``logsumexp(logits)^2``; None without ``training.z_loss`` or targets."""
    has_targets: bool = True
    """Whether any rank had a token to predict. If not, no weight or optimizer state has changed."""


class StepGuards(Protocol):
    """Callbacks of a step. Every rank calls the same methods in the same order."""

    @property
    def loss_scale(self) -> Tensor | None:
        """Return the factor of the loss in the backward pass of the next step, [] fp32 on the device; None: one."""

    def begin_phase(self, phase: str) -> None:
        """Note that a part of the step begins: data, forward, backward, optimizer or other."""

    def should_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return [] fp32 on the device: 1 to skip the update, else 0; the same on every rank.

        Args:
            loss: [] this rank's part of the mean loss.
            grad_norm: [] of all ranks, not finite if the loss of any rank is not.
        """

    def before_update(self) -> None:
        """Act before weights and optimizer states can change; the update may then be skipped."""

    def without_targets(self) -> None:
        """Act when no rank has a token to predict, instead of :meth:`before_update`."""


class SkipNonFinite:
    """The minimal guard: skips updates whose gradient norm is not finite.

    Args:
        loss_scaler: of fp16 training.
    """

    def __init__(self, loss_scaler: LossScaler | None = None):
        self._loss_scaler = loss_scaler

    @property
    def loss_scale(self) -> Tensor | None:
        """See :class:`StepGuards`."""
        return None if self._loss_scaler is None else self._loss_scaler.scale

    def begin_phase(self, phase: str) -> None:
        """See :class:`StepGuards`."""

    def should_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """See :class:`StepGuards`."""
        skip = (~grad_norm.isfinite()).float()
        if self._loss_scaler is not None:
            self._loss_scaler.update(loss, skip)
        return skip

    def before_update(self) -> None:
        """See :class:`StepGuards`."""

    def without_targets(self) -> None:
        """See :class:`StepGuards`."""


def train_step(
    model: ModelParts,
    forward_backward: ForwardBackward,
    optimizer: TrainingOptimizer,
    micro_batches: list[Batch],
    num_targets: float,
    learning_rate: float,
    clip: float,
    guards: StepGuards,
    step: int = 0,
) -> StepResult:
    """Make one optimizer step. All ranks must call this.

    If no rank has a target, weights and optimizer states stay as they are.

    Args:
        model: this rank's part.
        forward_backward: computes losses and gradients of ``model``.
        optimizer: of the parameters of ``model``.
        micro_batches: of this rank.
        num_targets: number of targets in the global batch, over all ranks.
        learning_rate: of this step.
        clip: global gradient norm above which gradients are scaled down; 0 turns clipping off.
        guards: watch the step, and decide whether to skip its update.
        step: its number in the run, of which random masks are a function.
    """
    if num_targets > 0:
        scale = guards.loss_scale
        targets = num_targets if scale is None else num_targets / scale
        model.begin_step(scale)
        loss = unscaled(forward_backward.accumulate_gradients(micro_batches, targets, guards.begin_phase), scale)
        guards.begin_phase("optimizer")
        # With the loss, so that one that is not finite shows in the norm of all ranks.
        grad_norm = unscaled(global_norm(model.parameters(), model.unique_parameters(), loss), scale)
        set_learning_rate(optimizer, learning_rate)
        guards.before_update()
        divisor = total_divisor(clip_divisor(grad_norm, clip), scale)
        skip = guards.should_skip(loss, grad_norm)
        step_unless(optimizer, skip, divisor, step)
        model.end_step(skip)
        optimizer.zero_grad(set_to_none=True)
        z_loss = None if model.z_loss is None else model.z_loss.mean(num_targets)
    else:
        z_loss = None
        loss = grad_norm = torch.full((), math.nan)
        guards.without_targets()
    allocate_states(optimizer)  # a checkpoint needs those of all parameters, also of those without an update
    guards.begin_phase("other")
    return StepResult(loss, grad_norm, learning_rate, z_loss, num_targets > 0)
