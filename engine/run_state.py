"""A run and how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..kernels.attention import Choice as AttentionChoice
    from .config.settings import RunConfig
    from .data.catalog import Catalog
    from .data.loader import TrainingData
    from .data.sample_order import SampleOrder
    from .evaluation import Validation
    from .guards.run_guards import RunGuards
    from .guards.stop_request import StopRequest
    from .observe.reporter import Reporter
    from .parallel.build import Choices
    from .parallel.forward_backward import ForwardBackward, ModelParts
    from .parallel.mesh import Mesh
    from .parallel.precision import Precision
    from .parallel.process_group import Ranks
    from .schedule import BatchPlan
    from .start import Start
    from .weights.checkpoint.manifest import Manifest
    from .weights.checkpoint.saver import Saver
    from .weights.checkpoint.store import CheckpointStore


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    """Best evaluation: ``{"step", "name", "loss"}``."""

    def with_best(self, best: dict[str, Any]) -> Progress:
        """The same with another best evaluation."""
        return replace(self, best=best)


@dataclass
class Run:
    """Everything that a run on all ranks consists of. The last two fields change from step to step."""

    config: RunConfig
    ranks: Ranks
    stop: StopRequest
    say: Callable[..., None]
    """Prints lines for people, on the main rank."""
    plan: BatchPlan
    mesh: Mesh
    precision: Precision
    attention: AttentionChoice
    choices: Choices
    start: Start
    """What it starts from."""
    catalog: Catalog
    order: SampleOrder
    data: TrainingData
    validation: Validation
    model: ModelParts
    forward_backward: ForwardBackward
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    saver: Saver
    guards: RunGuards
    report: Reporter
    remarks: list[str]
    """Lines for the log."""
    progress: Progress
    evaluation_pending: bool = field(init=False)
    """Whether it evaluates before its next step."""

    def __post_init__(self) -> None:
        resumed = self.start.resumed
        asked = self.config.training.eval_at_start
        self.evaluation_pending = asked if resumed is None else self.must_evaluate_at(resumed)

    @property
    def remaining_steps(self) -> int:
        """Steps until the token budget is used up."""
        return self.plan.steps_left(self.config.training.train_tokens, self.progress.tokens)

    @property
    def last_sample(self) -> int:
        """Samples consumed when the budget is used up."""
        return self.progress.samples + self.remaining_steps * self.plan.global_batch_size

    def advance(self) -> None:
        """Count one step."""
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            samples=self.progress.samples + self.plan.global_batch_size,
            tokens=self.progress.tokens + self.plan.tokens_per_step,
        )

    def evaluation_due(self) -> bool:
        """Return whether the run evaluates after the step it has come to."""
        interval = self.config.training.eval_interval
        return self.remaining_steps == 0 or (interval > 0 and self.progress.step % interval == 0)

    def must_evaluate_at(self, manifest: Manifest) -> bool:
        """Return whether the run, at the checkpoint of ``manifest``, evaluates before its next step."""
        asked = self.config.training.eval_at_start and self.remaining_steps == 0
        return self.evaluation_due() and (asked or not manifest.evaluation)
