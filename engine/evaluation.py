"""Evaluate the validation sets, on the same chunks each time, and record the best evaluation.

Losses on other texts, on more of them, or with shorter windows cannot be compared. The record of the best evaluation
therefore has a fingerprint of the evaluated data, and starts over when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.linear_cross_entropy import IGNORE_INDEX
from .batch import Batch
from .config.settings import RunConfig, TrainingConfig
from .data.catalog import Catalog
from .data.loader import SourceBatch, describe_evaluated, validation_batches
from .data.source import Source
from .errors import UserError
from .observe.loss_changes import LossChange
from .observe.waiting import ProgressBar, Say
from .optim import TrainingOptimizer, average_of
from .parallel.forward_backward import ForwardBackward
from .parallel.mesh import Mesh
from .parallel.process_group import Ranks
from .schedule import BatchPlan, Progress
from .weights.checkpoint.manifest import Manifest

_MIX = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Odd constants of splitmix64 (Steele, Lea and Flood, 2014)."""


@dataclass(frozen=True)
class BestMetric:
    """The metric of the best evaluation: the loss on the first validation set."""

    name: str
    fingerprint: str
    """Fingerprint of all evaluated (token, target, position) of the set."""

    def matches(self, best: Mapping[str, Any]) -> bool:
        """Return whether the record ``best`` uses this metric. Records of versions without fingerprints are compared
        by name.
        """
        return best.get("name") == self.name and best.get("measured", self.fingerprint) == self.fingerprint

    def improves(self, best: Mapping[str, Any], loss: float) -> bool:
        """Return whether ``loss`` replaces the record ``best``."""
        return not self.matches(best) or loss < best["loss"]

    def record(self, step: int, loss: float) -> dict[str, Any]:
        """Return the record of an evaluation, in JSON's types."""
        return {"step": step, "name": self.name, "loss": loss, "measured": self.fingerprint}

    def describe_reset(self, best: Mapping[str, Any]) -> list[str]:
        """Return a line for the log if the record ``best`` of a checkpoint cannot be continued."""
        if not best or self.matches(best):
            return []
        reason = "of another set" if best.get("name") != self.name else "of other data, eval_tokens or sequence_length"
        return [
            f"note: the record of the best evaluation starts over with {self.name}: {best.get('name')} "
            f"{best.get('loss', float('nan')):.4f} of step {best.get('step')} is {reason}"
        ]


@dataclass(frozen=True)
class EvaluatedSet:
    """A validation set, and this rank's batches of it."""

    name: str
    sources: list[str]
    """Names of the sources of its text."""
    batches: list[SourceBatch]
    num_targets: list[float]
    """Number of targets of each source, on all ranks."""
    fingerprint: str
    """See :func:`fingerprint`."""

    def losses(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the mean loss per target of the set, and of each of several sources as ``set/source``.

        Args:
            sums: sum of the losses of each source, on all ranks.
        """
        losses = {self.name: sum(sums) / sum(self.num_targets)}
        for source, loss, count in zip(self.sources, sums, self.num_targets, strict=True):
            if len(self.sources) > 1 and count:
                losses[f"{self.name}/{source}"] = loss / count
        return losses


class Validation:
    """This rank's batches of every validation set. They are read at the start, so bad data shows before the training.

    Raises:
        UserError: on all ranks: a set cannot be read, or has no target.
    """

    def __init__(
        self,
        config: RunConfig,
        catalog: Catalog,
        plan: BatchPlan,
        vocab_size: int,
        mesh: Mesh,
        ranks: Ranks,
        resumed_from: Manifest | None = None,
    ):
        tokens = config.training.eval_tokens
        self._ranks, self._progress_bar = ranks, config.logging.progress_bar
        # Whole steps of a pipeline.
        self._batches_between_stop_checks = plan.num_micro_batches * max(1, 16 // plan.num_micro_batches)
        across = config.data.attend_across_documents
        batches = ranks.fail_together(
            lambda: {
                name: list(validation_batches(sources, plan, mesh.data_rank, vocab_size, across, tokens))
                for name, sources in catalog.validation.items()
            }
        )
        self._sets = [
            _evaluated_set(name, catalog.validation[name], own, plan, mesh, ranks) for name, own in batches.items()
        ]
        for one in self._sets:
            if not sum(one.num_targets):
                raise UserError(
                    f"validation set '{one.name}' has no target: its loss mask leaves out every token that is "
                    "evaluated, or every document is of one token; use another set, or raise training.eval_tokens"
                )
        self.metric = next(iter(self.metrics), None)
        """None without validation sets."""
        self._extents = {
            name: describe_evaluated(sources, plan.sequence_length, tokens)
            for name, sources in catalog.validation.items()
        }
        self.at_start: dict[str, dict[str, Any]] = {}
        """See :attr:`~retemper.engine.weights.checkpoint.manifest.Manifest.start_evaluation`."""
        self._newest: Mapping[str, float] = {}
        if resumed_from is not None:
            self.continue_from(resumed_from)

    @property
    def metrics(self) -> list[BestMetric]:
        """The loss of every set as a metric."""
        return [BestMetric(one.name, one.fingerprint) for one in self._sets]

    def continue_from(self, manifest: Manifest) -> None:
        """Take the losses of the start of the run, and the newest ones, from a checkpoint."""
        self.at_start, self._newest = dict(manifest.start_evaluation), manifest.evaluation

    def describe(self) -> list[str]:
        """Return a line about the evaluated part of each set."""
        return [
            f"validation  {one.name}: {sum(one.num_targets):,.0f} targets in {self._extents[one.name]}"
            for one in self._sets
        ]

    def __bool__(self) -> bool:
        return bool(self._sets)

    def evaluate(
        self, forward_backward: ForwardBackward, step: int, should_stop: Callable[[], bool], say: Say
    ) -> dict[str, float]:
        """Return mean losses per target in nats, or nothing if interrupted. All ranks must call this.

        Args:
            forward_backward: computes losses.
            step: number of steps made. The losses after none are those that later ones are compared with.
            should_stop: called now and then; returns the same on all ranks.
            say: prints a line for people.

        Returns:
            the loss of every set by name, and of each source of a set with several ones as ``set/source``.
        """
        losses: dict[str, float] = {}
        total = sum(len(one.batches) for one in self._sets)
        what, is_main = f"evaluation at step {step}, micro-batches", self._ranks.is_main
        with ProgressBar(what, total, say, is_main, self._progress_bar) as bar:
            for one in self._sets:
                sums = [0.0] * len(one.sources)
                for first in range(0, len(one.batches), self._batches_between_stop_checks):
                    if should_stop():
                        say("  evaluation interrupted by the request to stop; the resumed run repeats it")
                        return {}
                    some = one.batches[first : first + self._batches_between_stop_checks]
                    of_batches = forward_backward.evaluate([batch for _, batch in some]).tolist()
                    for (source, _), loss in zip(some, of_batches, strict=True):
                        sums[source] += loss
                    bar.update(len(some))
                losses |= one.losses([self._ranks.all_reduce(loss) for loss in sums])
        if step:
            self._newest = losses
        else:
            self.at_start = {one.name: _record(one, losses) for one in self._sets}
        return losses

    def of_sets(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return the ``losses`` of whole sets."""
        return {one.name: losses[one.name] for one in self._sets if one.name in losses}

    def changes(self) -> dict[str, LossChange]:
        """Return how the newest losses differ from those at the start of the run, of the same text."""
        before: dict[str, float] = {}
        for one in self._sets:
            start = self.at_start.get(one.name, {})
            if start.get("measured") == one.fingerprint:
                before |= start["losses"]
        return {name: LossChange(before[name], loss) for name, loss in self._newest.items() if name in before}

    def best(self, losses: Mapping[str, float], progress: Progress) -> dict[str, Any] | None:
        """Return the record of ``losses`` if that of the first set is the lowest so far, otherwise None."""
        if not losses or progress.step == 0:  # step 0 has no checkpoint
            return None
        assert self.metric is not None
        loss = losses[self.metric.name]
        return self.metric.record(progress.step, loss) if self.metric.improves(progress.best, loss) else None


def _evaluated_set(
    name: str, sources: Sequence[Source], batches: list[SourceBatch], plan: BatchPlan, mesh: Mesh, ranks: Ranks
) -> EvaluatedSet:
    counts = [
        ranks.all_reduce(count_targets((batch for source, batch in batches if source == number), mesh))
        for number in range(len(sources))
    ]
    evaluated = fingerprint((batch for _, batch in batches), mesh.counts_samples, plan.sequence_length, ranks)
    return EvaluatedSet(name, [source.name for source in sources], batches, counts, evaluated)


def _record(one: EvaluatedSet, losses: Mapping[str, float]) -> dict[str, Any]:
    of_set = {name: loss for name, loss in losses.items() if name == one.name or name.startswith(f"{one.name}/")}
    return {"measured": one.fingerprint, "losses": of_set}


@contextmanager
def evaluated_weights(
    config: TrainingConfig, optimizer: TrainingOptimizer, hold_update: Callable[[], object]
) -> Iterator[None]:
    """Inside, let the model have the weights to evaluate: with ``training.eval_ema`` the average, else its own.

    Args:
        config: of the run.
        optimizer: of the model.
        hold_update: waits until a checkpoint that is being written has copied the weights.
    """
    average = average_of(optimizer) if config.eval_ema else None
    if average is None:
        yield
        return
    hold_update()
    with average.applied():
        yield


def count_targets(batches: Iterable[Batch], mesh: Mesh) -> float:
    """Return the number of targets in this rank's samples, or the sum of their weights; zero if another rank counts
    them.
    """
    return sum(batch.num_targets for batch in batches) if mesh.counts_samples else 0


def fingerprint(batches: Iterable[Batch], counted: bool, sequence_length: int, ranks: Ranks) -> str:
    """Return a hash of the evaluated data, which depends neither on the number of ranks nor on the micro-batch.

    Args:
        batches: of this rank.
        counted: whether this rank counts its samples; one of the ranks that read the same samples does.
        sequence_length: of the windows.
        ranks: all must call this.
    """
    total = 0
    for batch in batches if counted else ():
        valid = batch.targets != IGNORE_INDEX
        columns = (batch.tokens[valid], batch.targets[valid], batch.position_ids[valid])
        mixed = np.zeros(int(valid.sum()), np.uint64)
        for column, odd in zip(columns, _MIX, strict=True):
            mixed = (mixed ^ column.numpy().astype(np.uint64)) * odd
            mixed ^= mixed >> np.uint64(31)
        # A sum does not depend on the order of the samples.
        total += int(mixed.sum(dtype=np.uint64))
    return f"{sequence_length}:{sum(ranks.all_gather(total)) % 2**64:016x}"
