"""Measures a run between its reports, and tells its observers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..config.settings import RunConfig
from ..model.architecture import Architecture
from ..parallel.process_group import Ranks
from ..run_state import Progress
from ..schedule import BatchPlan
from ..step import StepResult
from .end_summary import Totals
from .flops import flops_per_token
from .observer import Say, StepRecord, create_observers
from .progress import Stopwatch, speed
from .stragglers import Stragglers


class Reporter:
    """Everything that is measured about a run. All ranks call its methods alike, except where they say otherwise.

    Args:
        config: of the run.
        ranks: that train together.
        plan: of its steps.
        architecture: of the model.
        blocks: of this rank.
        progress: at the start.
        say: prints a line for people, on the main rank.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        plan: BatchPlan,
        architecture: Architecture,
        blocks: Iterable[nn.Module],
        progress: Progress,
        say: Say,
    ):
        self._ranks, self._tokens_per_step = ranks, plan.tokens_per_step
        self._flops = flops_per_token(
            architecture, plan.sequence_length, causal_halved=False, trainable=config.training.trainable
        )
        self.observers = create_observers(config, say) if ranks.is_main else []
        self.stragglers = Stragglers(ranks, blocks, config.logging.stragglers)
        self.totals = Totals(progress)
        self.stopwatch = Stopwatch()

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """Tell the observers, on the main rank only; see :class:`~retemper.engine.observe.observer.Observer`.

        Raises:
            OSError: the run folder cannot be written.
        """
        for observer in self.observers:
            observer.start(after_step, evaluates_again)

    def step(
        self, progress: Progress, remaining_steps: int, result: StepResult, counts: Mapping[str, int]
    ) -> dict[str, float]:
        """Report a step. Waits for the device.

        Args:
            progress: after it.
            remaining_steps: of the run.
            result: of the step.
            counts: further numbers for the record.

        Returns:
            loss of all ranks, and gradient norm, by name.
        """
        loss, grad_norm = self._ranks.all_reduce(result.loss.item()), result.grad_norm.item()
        stragglers = self.stragglers.report()
        seconds, steps = self.stopwatch.lap()
        self.totals.add_steps(seconds, steps)
        self.totals.add_loss("training", progress.step, loss)
        values: dict[str, Any] = {
            "loss": loss if result.has_targets else None,
            "learning_rate": result.learning_rate,
            "grad_norm": grad_norm if result.has_targets else None,
            **counts,
            **speed(seconds / steps, self._tokens_per_step, self._flops, self._ranks),
            **stragglers.values,
        }
        seconds_left = remaining_steps * self.totals.mean_step_seconds
        record = StepRecord(progress, values, remaining_steps, seconds_left, stragglers.lines)
        for observer in self.observers:
            observer.step(record)
        return {"loss": loss, "gradient norm": grad_norm}

    def evaluation(self, progress: Progress, losses: Mapping[str, float]) -> None:
        """Report mean losses per target of validation sets, in nats, by name."""
        for name, loss in losses.items():
            self.totals.add_loss(f"validation {name}", progress.step, loss)
            values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            for observer in self.observers:
                observer.evaluation(progress, name, values)

    def save(self) -> None:
        """A checkpoint is about to be written."""
        for observer in self.observers:
            observer.save()

    def end(self, progress: Progress) -> list[str]:
        """The run has ended. Return lines about all of this start."""
        for observer in self.observers:
            observer.end()
        return self.totals.table(progress, self._tokens_per_step, self._ranks)
