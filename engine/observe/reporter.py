"""Measure a run, and report it to its observers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.settings import RunConfig
from ..model.architecture import Architecture
from ..optim import loss_scaling
from ..parallel import trainable
from ..parallel.forward_backward import ModelParts
from ..parallel.process_group import Ranks
from ..schedule import BatchPlan, Progress
from ..step import StepResult
from .callbacks import create_callbacks
from .console_lines import console_lines
from .expert_load import ExpertLoad
from .flops import flops_per_token
from .guarded import Guarded
from .host_copy import HostCopy
from .loss_changes import LossChange, part_of
from .metrics_file import MetricsFile, SamplesFile
from .metrics_server import MetricsServer, require_server
from .observer import Observer, RunDescription, Sample, StepRecord
from .progress import Stopwatch, speed
from .stragglers import Lap, Stragglers
from .tensorboard import TensorBoard
from .totals import Totals
from .trackers.all_trackers import Trackers
from .trackers.creation import create_trackers
from .waiting import Say


def create_observers(config: RunConfig, say: Say) -> list[Observer]:
    """Return the configured observers; ``say`` prints a line for people."""
    folder = Path(config.run_folder)
    # The others may read the first file.
    observers: list[Observer] = [MetricsFile(folder, say), SamplesFile(folder, say)]
    if config.logging.tensorboard:
        remedy = "metrics.jsonl has the same numbers (logging.tensorboard: false silences this)"
        observers.append(Guarded("TensorBoard", TensorBoard(folder), remedy, say))
    return [*observers, *create_trackers(config, say), console_lines(config.logging, say)]


def create_early_observers(config: RunConfig, say: Say) -> list[Observer]:
    """Return the observers whose settings may be wrong, so that such a run is refused before it loads anything.

    Raises:
        UserError: a callback cannot be created, or the port of ``logging.metrics_port`` cannot be used.
    """
    observers: list[Observer] = []
    port = config.logging.metrics_port
    if port is not None:
        require_server(port)
        remedy = "restart the run to serve its numbers, or set logging.metrics_port to null"
        observers.append(Guarded("the server of logging.metrics_port", MetricsServer(port), remedy, say))
    return [*observers, *create_callbacks(config.callbacks, say)]


class ReportedStep(NamedTuple):
    """The numbers of a reported step, the same on all ranks."""

    step: int
    numbers: dict[str, float]
    """Loss of all ranks and gradient norm, by name."""
    skips: list[float]
    """See :attr:`~retemper.engine.guards.step_guard.StepGuard.numbers`."""


@dataclass(frozen=True)
class _PendingStep:
    """A step whose numbers may still be on their way from the device."""

    progress: Progress
    remaining_steps: int
    result: StepResult
    numbers: HostCopy
    """Without targets only the guard's numbers; else loss, gradient norm and z-loss, if there is one, before them."""
    steps_without_targets: int
    steps: int
    """Number of steps since the last report."""
    profiled: bool
    """Whether any of these was profiled."""
    stragglers: Lap
    expert_load: HostCopy | None


def _numbers(pending: _PendingStep) -> tuple[float, float, float | None, list[float]]:
    """Return loss, gradient norm, z-loss and the guard's numbers of a step. Waits until the device has completed it."""
    result, numbers = pending.result, pending.numbers.wait()
    if not result.has_targets:
        return math.nan, math.nan, None, numbers
    if result.z_loss is None:
        return numbers[0], numbers[1], None, numbers[2:]
    return numbers[0], numbers[1], numbers[2], numbers[3:]


class Reporter:
    """Measures a run and notifies its observers. All ranks must call its methods, unless stated otherwise.

    Args:
        config: of the run.
        ranks: that train together.
        plan: of its steps.
        architecture: of the model.
        model: this rank's part.
        progress: at the start.
        say: prints a line for people, on the main rank.
        early: observers from :func:`create_early_observers`, on the main rank.
        epoch_tokens: tokens in an epoch; None: the data has none, and records have no epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        plan: BatchPlan,
        architecture: Architecture,
        model: ModelParts,
        progress: Progress,
        say: Say,
        early: Sequence[Observer] = (),
        epoch_tokens: int | None = None,
    ):
        self._ranks, self._tokens_per_step, self._epoch_tokens = ranks, plan.tokens_per_step, epoch_tokens
        learning = trainable.learning(architecture, config.training, config.adapter)
        self._flops = flops_per_token(architecture, plan.sequence_length, False, learning)
        self.observers = create_observers(config, say) if ranks.is_main else []
        self.observers += early
        self.stragglers = Stragglers(ranks, model.blocks(), config.logging.stragglers)
        self._expert_load = ExpertLoad(model.routers)
        self.totals = Totals(progress)
        self.stopwatch = Stopwatch()
        self._pending: _PendingStep | None = None
        self.reports_late = ranks.device.type == "cuda"
        """Whether :meth:`report_pending` is best called when the next step has been launched, because the numbers of a
        step are on a GPU. A host that waits for them at once lets the GPU run out of work."""

    @property
    def tracker_runs(self) -> dict[str, str]:
        """Ids of the run in its trackers, by name of the tracker, on the main rank."""
        return next((one.run_ids for one in self.observers if isinstance(one, Trackers)), {})

    def open(self, run: RunDescription) -> None:
        """Describe the run to the observers, on the main rank only."""
        for observer in self.observers:
            observer.open(run)

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """Tell the observers, on the main rank only; see :class:`~retemper.engine.observe.observer.Observer`.

        Raises:
            OSError: the run folder cannot be written.
        """
        for observer in self.observers:
            observer.start(after_step, evaluates_again)

    def step(
        self,
        progress: Progress,
        remaining_steps: int,
        result: StepResult,
        skips: Tensor,
        steps_without_targets: int,
    ) -> None:
        """Note a step, to be reported by :meth:`report_pending`, without waiting for the device.

        Args:
            progress: after it.
            remaining_steps: of the run.
            result: of the step.
            skips: [n] fp32 on the device: see :attr:`~retemper.engine.guards.step_guard.StepGuard.numbers`.
            steps_without_targets: number of them so far.
        """
        assert self._pending is None, "a step was not reported"
        # Without targets loss and norm are NaN, and on the host.
        of_step = [result.loss, result.grad_norm] if result.has_targets else []
        of_step = [number.reshape(1) for number in (*of_step, result.z_loss) if number is not None]
        numbers, (steps, profiled) = HostCopy(torch.cat([*of_step, skips])), self.stopwatch.take_steps()
        lap, expert_load = self.stragglers.lap(), self._expert_load.copy() if result.has_targets else None
        self._pending = _PendingStep(
            progress, remaining_steps, result, numbers, steps_without_targets, steps, profiled, lap, expert_load
        )

    def report_pending(self) -> ReportedStep | None:
        """Report the step that was noted, if any. Waits until the device has completed it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        progress, result = pending.progress, pending.result
        loss, grad_norm, z_loss, skips = _numbers(pending)
        loss = self._ranks.all_reduce(loss)
        stragglers = self.stragglers.report(pending.stragglers)
        of_experts, warnings = self._expert_load.report(pending.expert_load)
        seconds = self.stopwatch.lap()
        if not pending.profiled:
            self.totals.add_steps(seconds, pending.steps)
        self.totals.add_loss("training", progress.step, loss)
        values: dict[str, Any] = {
            "loss": loss if result.has_targets else None,
            "learning_rate": result.learning_rate,
            "grad_norm": grad_norm if result.has_targets else None,
            **({"z_loss": self._ranks.all_reduce(z_loss)} if z_loss is not None else {}),
            "skipped_steps": int(skips[0]),
            "steps_without_targets": pending.steps_without_targets,
            **({"epoch": progress.tokens / self._epoch_tokens} if self._epoch_tokens else {}),
            **loss_scaling.metrics(skips[3:]),
            **of_experts,
            **speed(seconds / pending.steps, self._tokens_per_step, self._flops, self._ranks),
            **stragglers.values,
            **({"profiled": True} if pending.profiled else {}),
        }
        seconds_left = pending.remaining_steps * (self.totals.mean_step_seconds or seconds / pending.steps)
        lines = [*stragglers.lines, *warnings]
        record = StepRecord(progress, values, pending.remaining_steps, seconds_left, lines)
        for observer in self.observers:
            observer.step(record)
        return ReportedStep(progress.step, {"loss": loss, "gradient norm": grad_norm}, skips)

    def evaluation(
        self, progress: Progress, losses: Mapping[str, float], changes: Mapping[str, LossChange] | None = None
    ) -> None:
        """Report mean losses per target, in nats.

        Args:
            progress: of the run.
            losses: by name of the evaluation; see :meth:`Observer.evaluation`.
            changes: since the start of the run.
        """
        for name, loss in losses.items():
            if part_of(name, losses) is None:
                self.totals.add_loss(f"validation {name}", progress.step, loss)
            values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            if changes and name in changes:
                values["change_since_start"] = changes[name].change
            for observer in self.observers:
                observer.evaluation(progress, name, values)

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """Report generated text."""
        for observer in self.observers:
            observer.samples(progress, samples)

    def save(self) -> None:
        """Notify the observers that a checkpoint is about to be written."""
        for observer in self.observers:
            observer.save()

    def end(self, progress: Progress, finished: bool, changes: Mapping[str, LossChange]) -> list[str]:
        """Notify the observers of the end, and return lines about this start of the run.

        Args:
            progress: of the run.
            finished: whether the token budget is used up.
            changes: of validation losses since the start of the run.
        """
        of_losses = {name: change.to_dict() for name, change in changes.items()}
        summary = {"finished": finished, **self.totals.summary(progress), "changes": of_losses}
        for observer in self.observers:
            observer.end(summary)
        return self.totals.table(progress, self._tokens_per_step, self._ranks)
