"""Everything that a run consists of, and how much of it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .config.settings import RunConfig
from .data.catalog import Catalog
from .data.loader import TrainingData
from .data.sample_order import SampleOrder
from .early_stopping import EarlyStopping
from .evaluation import Validation
from .guards.run_guards import RunGuards
from .guards.stop_request import StopRequest
from .observe.profiler import StepProfiler
from .observe.reporter import Reporter
from .optim import TrainingOptimizer
from .out_of_memory import MemoryGuard
from .parallel.build import Choices
from .parallel.forward_backward import ForwardBackward, ModelParts
from .parallel.mesh import Mesh
from .parallel.process_group import Ranks
from .prompt_samples import PromptSamples
from .schedule import BatchPlan, Progress, is_due
from .start import Start
from .weights.checkpoint.manifest import Manifest
from .weights.checkpoint.saver import Saver
from .weights.checkpoint.store import CheckpointStore


@dataclass
class Run:
    """The parts of a run on this rank. Only ``progress`` and ``evaluation_pending`` change from step to step."""

    config: RunConfig
    ranks: Ranks
    stop: StopRequest
    say: Callable[..., None]
    """Prints lines for people, on rank 0."""
    mesh: Mesh
    choices: Choices
    start: Start
    """What the run starts from."""
    catalog: Catalog
    data: TrainingData
    validation: Validation
    samples: PromptSamples
    model: ModelParts
    forward_backward: ForwardBackward
    optimizer: TrainingOptimizer
    store: CheckpointStore
    saver: Saver
    guards: RunGuards
    memory: MemoryGuard
    report: Reporter
    profiler: StepProfiler
    remarks: list[str]
    """Lines for the log."""
    progress: Progress
    evaluation_pending: bool = field(init=False)
    """True if the run evaluates before its next step."""
    early_stopping: EarlyStopping = field(init=False)

    def __post_init__(self) -> None:
        self.early_stopping = EarlyStopping(self.config.training.early_stopping, self.validation)
        resumed_from = self.start.resumed_from
        requested = self.config.training.eval_at_start
        self.evaluation_pending = requested if resumed_from is None else self.must_evaluate_at(resumed_from)

    @property
    def plan(self) -> BatchPlan:
        """Batch sizes."""
        return self.data.plan

    @property
    def order(self) -> SampleOrder:
        """The order of the training samples."""
        return self.data.order

    @property
    def remaining_steps(self) -> int:
        """Number of steps until the token budget is used up; 0 if the run has stopped early."""
        return 0 if self.stopped_early else self._steps_of_budget

    @property
    def stopped_early(self) -> bool:
        """Whether the run ends here, although its token budget is not used up."""
        return self._steps_of_budget > 0 and self.early_stopping.stopped(self.progress)

    @property
    def _steps_of_budget(self) -> int:
        return self.plan.steps_left(self.config.training.budget, self.progress.tokens)

    @property
    def end_sample(self) -> int:
        """Number of samples consumed when the budget is used up: one past the last sample of the run."""
        return self.progress.samples + self.remaining_steps * self.plan.global_batch_size

    def evaluation_due(self) -> bool:
        """Return whether the run evaluates after the current step."""
        return self.remaining_steps == 0 or self.is_due(self.config.training.eval_interval)

    def is_due(self, interval: int | str) -> bool:
        """Return whether the current step is one of ``interval``; see :func:`~retemper.engine.schedule.is_due`."""
        return is_due(interval, self.progress, self.plan, self.catalog.epoch_tokens)

    def must_evaluate_at(self, manifest: Manifest) -> bool:
        """Return whether the run, at the checkpoint of ``manifest``, evaluates before its next step."""
        requested = self.config.training.eval_at_start and self.remaining_steps == 0
        return self.evaluation_due() and (requested or not manifest.evaluation)
