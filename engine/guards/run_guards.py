"""All guards of a run in one object, for the step and for the recipe between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from ..config.settings import RunConfig
from ..errors import UserError
from ..optim import TrainingOptimizer
from ..parallel.forward_backward import ModelParts
from ..parallel.process_group import Ranks
from ..step import StepResult
from ..weights.checkpoint.manifest import Manifest
from ..weights.checkpoint.saver import Saver
from ..weights.checkpoint.store import CheckpointStore
from .emergency import EmergencySave
from .garbage_collection import GarbageCollection
from .replica_check import ReplicaCheck
from .step_guard import StepGuard
from .watchdog import Watchdog


class UnreadableData(UserError):
    """Training data cannot be read. The state of the run is valid."""


class RunGuards:
    """Skips harmful updates, ends hangs, compares replicas, saves after a failed step, and collects garbage.

    Enter it while the run trains. Implements :class:`~retemper.engine.step.StepGuards`.

    Args:
        config: of the run.
        ranks: that train together.
        store: of its checkpoints.
        saver: writes them.
        model: this rank's part.
        say: prints a line for people, on the main rank.
        resumed: manifest of the checkpoint that the run continues from.
        on_phase: called with the name of each part of a step that begins.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        store: CheckpointStore,
        saver: Saver,
        model: ModelParts,
        say: Callable[[str], None],
        resumed: Manifest | None,
        on_phase: Callable[[str], None],
    ):
        self._ranks, self._store, self._saver, self._model = ranks, store, saver, model
        seconds = config.parallel.timeout_seconds
        self.step_guard = StepGuard(config.training, ranks, self._newest_checkpoint, say)
        if resumed is not None:
            self.step_guard.load_state_dict(resumed.health)
        interval, pipeline = config.training.check_replicas_interval, config.parallel.pipeline
        self.replica_check = ReplicaCheck(interval, ranks, pipeline, self._newest_checkpoint)
        self.watchdog = Watchdog(seconds, ranks)
        saved = {name: parameter for name, parameter in model.named_parameters() if name not in model.base_names}
        self.emergency = EmergencySave(ranks, saved, saver, say, seconds)
        self._garbage = GarbageCollection(config.training.gc_interval)
        self._step, self._on_phase = 0, on_phase
        self._phase = "other"

    def __enter__(self) -> RunGuards:
        self.watchdog.__enter__()
        self._garbage.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._garbage.__exit__(*exc_info)
        self.watchdog.__exit__(*exc_info)

    # In a step

    def begin_step(self, step: int) -> None:
        """Note that step number ``step`` begins with its data."""
        self._step = step
        self.begin_phase("data")

    def begin_phase(self, phase: str) -> None:
        """See :class:`~retemper.engine.step.StepGuards`."""
        self.enter_phase(phase)
        self.watchdog.beat(self.where())

    def enter_phase(self, phase: str) -> None:
        """Note that a part of a step or of the time after it begins, without a time limit."""
        self._phase = phase
        self._on_phase(phase)

    def where(self) -> str:
        """Return the newest step and the phase that has begun, for messages."""
        return f"step {self._step}, {self._phase}"

    @property
    def loss_scale(self) -> Tensor | None:
        """See :class:`~retemper.engine.step.StepGuards`."""
        scaler = self.step_guard.loss_scaler
        return None if scaler is None else scaler.scale

    def should_skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """See :class:`~retemper.engine.step.StepGuards`."""
        return self.step_guard.should_skip(self._step, loss, grad_norm)

    def before_update(self) -> None:
        """Wait until a checkpoint that is being written has copied the weights and optimizer states."""
        self._saver.hold_update()
        self.emergency.state_consistent = False

    def without_targets(self) -> None:
        """See :class:`~retemper.engine.step.StepGuards`."""
        self.step_guard.count_without_targets(self._step)

    def step_done(self) -> None:
        """Note that the step is complete and counted."""
        self.emergency.state_consistent = True
        self._garbage.step_done(self._step)

    def sum_targets(self, count: float, problem: str | None) -> float:
        """Return the number of targets of all ranks. All ranks must call this.

        Args:
            count: number of targets of this rank.
            problem: error of this rank's data, or None.

        Raises:
            UnreadableData: on all ranks if any has a problem: the rank's own, or else the first.
        """
        # One collective serves both purposes: a rank without data makes the sum NaN.
        total = self._ranks.all_reduce(math.nan if problem else count)
        if math.isnan(total):
            try:
                self._ranks.raise_on_all(problem)
            except UserError as error:
                raise UnreadableData(*error.problems) from None
        return total

    # Between steps

    def pause_watchdog(self) -> None:
        """Disable the time limit until the next step begins."""
        self.watchdog.pause()

    def require_finite(self, step: int, numbers: dict[str, float]) -> None:
        """See :meth:`StepGuard.require_finite`."""
        self.step_guard.require_finite(step, numbers)

    def check_skipped(self, step: int, numbers: dict[str, float], counts: Sequence[float]) -> None:
        """Refuse to continue after too many skipped steps; see :meth:`StepGuard.check`."""
        self.step_guard.check(step, numbers, counts, self._model.parameters())

    def check_replicas(self, step: int, optimizer: TrainingOptimizer) -> None:
        """Compare replicas if that is due after ``step``; see :class:`ReplicaCheck`."""
        if self.replica_check.due(step):
            self.replica_check(step, self._model, optimizer)

    def require_savable(self, step: int, result: StepResult) -> None:
        """Raise UserError if the result of ``step``, the last one, or the weights are not finite. Waits for the device.

        All ranks must call this.
        """
        numbers = {"loss": self._ranks.all_reduce(result.loss.item()), "gradient norm": result.grad_norm.item()}
        self.check_skipped(step, numbers, self.step_guard.numbers.tolist())
        self.step_guard.require_finite_weights(step, self._model.parameters())

    def _newest_checkpoint(self) -> str:
        self.pause_watchdog()
        with suppress(UserError):
            self._saver.wait()  # complete the checkpoint that is being written
        complete = self._store.complete()
        return f"the newest checkpoint is {complete[-1]}" if complete else "no checkpoint has been written"
