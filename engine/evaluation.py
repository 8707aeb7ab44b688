"""The validation sets of a run: read once, evaluated again and again on the same chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .batch import Batch
from .best_evaluation import Measure, fingerprint
from .config.settings import RunConfig
from .data.catalog import Catalog
from .data.loader import describe_evaluated, validation_batches
from .errors import UserError
from .observe.waiting import ProgressBar, Say
from .parallel.forward_backward import ForwardBackward
from .parallel.mesh import Mesh
from .parallel.process_group import Ranks
from .run_state import Progress
from .schedule import BatchPlan


def count_targets(batches: Iterable[Batch], mesh: Mesh) -> int:
    """Targets of this rank's samples; of ranks that read the same ones, one counts them."""
    return sum(batch.num_targets for batch in batches) if mesh.counts_samples else 0


class Validation:
    """This rank's micro-batches of every validation set. Reading them at the start shows bad data before the training.

    Raises:
        UserError: on all ranks: a set cannot be read, or has no target.
    """

    def __init__(self, config: RunConfig, catalog: Catalog, plan: BatchPlan, vocab_size: int, mesh: Mesh, ranks: Ranks):
        data, tokens = config.data, config.training.eval_tokens
        self._ranks = ranks
        self._at_a_time = plan.num_micro_batches * max(1, 16 // plan.num_micro_batches)
        """Micro-batches between two looks at whether to stop: whole steps of a pipeline."""
        self._batches = ranks.run_on_all(
            lambda: {
                name: list(
                    validation_batches(sources, plan, mesh.data_rank, vocab_size, data.attend_across_documents, tokens)
                )
                for name, sources in catalog.validation.items()
            }
        )
        self._targets = {
            name: ranks.all_reduce(count_targets(batches, mesh)) for name, batches in self._batches.items()
        }
        for name, count in self._targets.items():
            if not count:
                raise UserError(
                    f"validation set '{name}' has no target: its loss mask leaves out every token that is evaluated, "
                    "or every document is of one token; use another set, or raise training.eval_tokens"
                )

        self.measure = self._measure(mesh, plan.sequence_length)
        """What decides which evaluation is the best; None without validation sets."""
        self._extents = {
            name: describe_evaluated(sources, plan.sequence_length, tokens)
            for name, sources in catalog.validation.items()
        }

    def describe(self) -> list[str]:
        """Lines about what is evaluated of each set."""
        return [f"validation  {name}: {self._targets[name]:,.0f} targets in {it}" for name, it in self._extents.items()]

    def _measure(self, mesh: Mesh, sequence_length: int) -> Measure | None:
        for name, batches in self._batches.items():
            return Measure(name, fingerprint(batches, mesh.counts_samples, sequence_length, self._ranks))
        return None

    def __bool__(self) -> bool:
        return bool(self._batches)

    @property
    def num_batches(self) -> int:
        """This rank's micro-batches of all sets."""
        return sum(map(len, self._batches.values()))

    def evaluate(
        self, forward_backward: ForwardBackward, step: int, stopping: Callable[[], bool], say: Say
    ) -> dict[str, float]:
        """Return :meth:`losses` after ``step``, and show the progress; empty where all ranks are to stop."""
        what = f"evaluation at step {step}, micro-batches"
        with ProgressBar(what, self.num_batches, say, self._ranks.is_main) as counted:
            losses = self.losses(forward_backward, stopping, counted.update)
        if self and not losses:
            say("  evaluation broken off: asked to stop; the run that resumes makes it")
        return losses

    def best(self, losses: Mapping[str, float], progress: Progress) -> dict[str, Any] | None:
        """Return the record of ``losses`` where that of the first set is its lowest so far, otherwise None."""
        if not losses or progress.step == 0:  # which has no checkpoint
            return None
        assert self.measure is not None
        loss = losses[self.measure.name]
        return self.measure.record(progress.step, loss) if self.measure.improves(progress.best, loss) else None

    def losses(
        self,
        forward_backward: ForwardBackward,
        stopping: Callable[[], bool],
        on_batches: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """Mean loss per target of every set, in nats; empty when ``stopping``, the same on all ranks, says so.

        Args:
            forward_backward: compute losses.
            stopping: asked now and then.
            on_batches: told how many micro-batches more are done.
        """
        losses = {}
        for name, batches in self._batches.items():
            loss_sum = 0.0
            for first in range(0, len(batches), self._at_a_time):
                if stopping():
                    return {}
                some = batches[first : first + self._at_a_time]
                loss_sum += forward_backward.evaluate(some).item()
                on_batches(len(some))
            losses[name] = self._ranks.all_reduce(loss_sum) / self._targets[name]
        return losses
