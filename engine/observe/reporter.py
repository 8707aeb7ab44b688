"""Measure a run, and report it to its observers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config.settings import RunConfig
from ..model.architecture import Architecture
from ..parallel.process_group import Ranks
from ..schedule import BatchPlan, Progress
from ..step import StepResult
from .flops import flops_per_token
from .metrics_file import MetricsFile
from .observer import Observer, StepRecord
from .progress import Stopwatch, speed, step_line
from .stragglers import Stragglers
from .tensorboard import TensorBoard
from .totals import Totals
from .waiting import Say


class ConsoleLines:
    """An observer that prints a line for each reported step and evaluation."""

    def __init__(self, say: Say):
        self._say = say

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """See :class:`Observer`."""

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        step, tokens = record.progress.step, record.progress.tokens
        self._say(step_line(step, record.remaining_steps, tokens, record.values, record.seconds_left))
        for line in record.remarks:
            self._say(line)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        self._say(
            f"  evaluation of {name} at step {progress.step}: loss {values['loss']:.4f}, perplexity "
            f"{values['perplexity']:.2f}"
        )

    def save(self) -> None:
        """See :class:`Observer`."""

    def end(self) -> None:
        """See :class:`Observer`."""


def create_observers(config: RunConfig, say: Say) -> list[Observer]:
    """Return the configured observers; ``say`` prints a line for people."""
    folder = Path(config.run_folder)
    observers: list[Observer] = [MetricsFile(folder, say)]
    if config.logging.tensorboard:
        observers.append(TensorBoard(folder, say))
    return [*observers, ConsoleLines(say)]


class Reporter:
    """Measures a run and notifies its observers. All ranks must call its methods, unless stated otherwise.

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
            loss of all ranks and gradient norm, by name.
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
        """Notify the observers that a checkpoint is about to be written."""
        for observer in self.observers:
            observer.save()

    def end(self, progress: Progress) -> list[str]:
        """Notify the observers of the end, and return lines about this start of the run."""
        for observer in self.observers:
            observer.end()
        return self.totals.table(progress, self._tokens_per_step, self._ranks)
