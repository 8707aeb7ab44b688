"""Compute batches, steps and the learning rate from consumed tokens, the clock of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from .config.settings import OptimizerConfig, TrainingConfig
from .errors import UserError

_MIN_RATIO = 0.1
"""Learning rate at the end of the decay as a fraction of the peak, if neither is set."""


@dataclass(frozen=True)
class Progress:
    """What a run has consumed so far, and its best evaluation."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    """Record of the best evaluation; see :class:`~retemper.engine.evaluation.BestMetric`."""
    early_stopping: dict[str, Any] = field(default_factory=dict)
    """State of :class:`~retemper.engine.early_stopping.EarlyStopping`."""

    def after_step(self, plan: BatchPlan) -> Progress:
        """Return the progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + plan.global_batch_size,
            tokens=self.tokens + plan.tokens_per_step,
        )


def is_due(interval: int | str, progress: Progress, plan: BatchPlan, epoch_tokens: int | None) -> bool:
    """Return whether something that happens at every ``interval`` happens after the step that led to ``progress``.

    Args:
        interval: number of steps, 0: never; or epoch: at the first step with which all tokens of an epoch are used.
        progress: of the run.
        plan: its batch sizes.
        epoch_tokens: tokens in an epoch; None if the data has none.
    """
    if isinstance(interval, str):
        before = progress.tokens - plan.tokens_per_step
        return epoch_tokens is not None and before >= 0 and progress.tokens // epoch_tokens > before // epoch_tokens
    return interval > 0 and progress.step % interval == 0


@dataclass(frozen=True)
class BatchPlan:
    """Division of a global batch into micro-batches of ranks."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches that each rank accumulates in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens that one step consumes over all ranks."""
        return self.global_batch_size * self.sequence_length

    def steps_for(self, tokens: int) -> int:
        """Return the number of steps that consume at least ``tokens``."""
        return -(-tokens // self.tokens_per_step)

    def steps_left(self, train_tokens: int, tokens: int) -> int:
        """Return the number of steps until ``train_tokens`` are consumed, if ``tokens`` are consumed already."""
        return self.steps_for(max(0, train_tokens - tokens))

    def sample_offsets(self, data_rank: int) -> list[range]:
        """Return the samples of each of this rank's micro-batches, as offsets into the global batch."""
        width = self.micro_batch_size * self.data_parallel_size
        first = data_rank * self.micro_batch_size
        return [
            range(start + first, start + first + self.micro_batch_size)
            for start in range(0, self.global_batch_size, width)
        ]


def plan_batches(training: TrainingConfig, data_parallel_size: int) -> BatchPlan:
    """Divide the global batch over ``data_parallel_size`` ranks.

    Raises:
        UserError: it cannot be divided evenly.
    """
    width = training.micro_batch_size * data_parallel_size
    if training.global_batch_size % width:
        lower = training.global_batch_size // width * width
        choices = f"{lower} or {lower + width}" if lower else str(width)
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data-parallel ranks {data_parallel_size} = {width}; use {choices}"
        )
    return BatchPlan(
        training.sequence_length, training.global_batch_size, training.micro_batch_size, data_parallel_size
    )


def minimum_rate(optimizer: OptimizerConfig) -> float:
    """Return the learning rate at the end of the decay."""
    if optimizer.min_learning_rate is not None:
        return optimizer.min_learning_rate
    ratio = optimizer.min_learning_rate_ratio
    return optimizer.learning_rate * (_MIN_RATIO if ratio is None else ratio)


def decay_tokens(training: TrainingConfig, optimizer: OptimizerConfig) -> int:
    """Return the length of the wsd schedule's decay in tokens."""
    return optimizer.decay_tokens or max(1, (training.budget - optimizer.schedule_start_tokens) // 10)


def learning_rate(tokens: int, training: TrainingConfig, optimizer: OptimizerConfig) -> float:
    """Return the learning rate of the step after which ``tokens`` tokens have been consumed.

    The rate warms up linearly from zero to the peak, which the step that ends at ``warmup_tokens`` uses. It then
    decays; the step that ends at ``train_tokens`` uses the minimum (cosine, linear, wsd). With
    ``schedule_start_tokens`` all of this is counted from there, and the warm-up starts at the minimum, where the former
    schedule ended (re-warming: Ibrahim et al., 2024, https://arxiv.org/abs/2403.08763). Cosine: Loshchilov and Hutter,
    2017, https://arxiv.org/abs/1608.03983; wsd: Hu et al., 2024, https://arxiv.org/abs/2404.06395, its decay by
    1 - sqrt: Hägele et al., 2024, https://arxiv.org/abs/2405.18392; inverse square root: Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762.
    """
    peak, minimum, start = optimizer.learning_rate, minimum_rate(optimizer), optimizer.schedule_start_tokens
    tokens, train_tokens, decay_start = max(0, tokens - start), training.budget - start, training.warmup
    if tokens < decay_start:
        lowest = minimum if start else 0.0
        return lowest + (peak - lowest) * tokens / decay_start
    if optimizer.schedule == "constant":
        return peak
    if optimizer.schedule == "inverse_sqrt":
        return max(minimum, peak * math.sqrt(decay_start / tokens)) if tokens else peak
    shape: str = optimizer.schedule
    if shape == "wsd":
        shape = optimizer.decay_shape
        decay_start = max(decay_start, train_tokens - decay_tokens(training, optimizer))
    span = max(1, train_tokens - decay_start)
    progress = min(1.0, max(0.0, (tokens - decay_start) / span))
    if shape == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    elif shape == "sqrt":
        progress = math.sqrt(progress)
    return peak + (minimum - peak) * progress
