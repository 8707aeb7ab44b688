"""The base class of the observers of a run: records, trackers and the callbacks of users.

The training loop does not know them. :func:`~retemper.engine.observe.reporter.create_observers` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..schedule import Progress


@dataclass(frozen=True)
class RunDescription:
    """The facts of a run that are known before its first step. They hold no secrets."""

    folder: Path
    """The run folder."""
    config: Mapping[str, Any]
    """The resolved configuration, as nested plain values."""
    model: Mapping[str, Any]
    """``model_type``, ``parameters``, ``trainable_parameters``, ``implementation``."""
    datasets: Mapping[str, Mapping[str, Any]]
    """Fingerprint of every training source; see :class:`~retemper.engine.data.catalog.Catalog`."""
    code: Mapping[str, Any]
    """Versions of the program and its libraries, and the state of its git repository if it is in one."""
    world_size: int
    resumed: bool
    """Whether the run continues from a checkpoint."""
    tracker_runs: Mapping[str, str] = field(default_factory=dict)
    """Ids of the run in its trackers, by name of the tracker, from the checkpoint."""
    former_tracker_runs: Mapping[str, str] = field(default_factory=dict)
    """Ids of the runs, by name of the tracker, on which this one is based without continuing their curves."""
    recorded_step: int | None = None
    """Last step in metrics.jsonl when the run was opened: the checkpoint may be older."""
    request_stop: Callable[[str], None] = lambda reason: None
    """Asks the run to save and to stop, after the next step at the latest; takes the reason, for the log."""


class StepRecord(NamedTuple):
    """A reported step: every ``logging.log_interval``-th, the first and the last one."""

    progress: Progress
    """After the step."""
    values: dict[str, Any]
    """Numbers by name: loss, learning rate, gradient norm, speed, memory, ..."""
    remaining_steps: int
    seconds_left: float
    """Estimated time until the end of the run."""
    remarks: list[str]
    """Lines about slow ranks."""


class Sample(NamedTuple):
    """Text that the model generated during training."""

    prompt: str
    text: str
    """The continuation, without the prompt."""


class Observer:
    """Receives the events of a run, on rank 0 only. Every method here does nothing; observers override what they need.

    An exception in a method of a tracker or callback is reported once, and this observer receives no more events; the
    run continues.
    """

    def open(self, run: RunDescription) -> None:
        """Handle the beginning of the command, once, before :meth:`start`."""

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """Handle the start of a run, or its continuation after a rollback.

        Args:
            after_step: the step from which the run continues; None for a new run.
            evaluates_again: whether the run repeats the evaluations of ``after_step``.

        Raises:
            OSError: the run folder cannot be written.
        """

    def step(self, record: StepRecord) -> None:
        """Handle a reported step."""

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """Handle an evaluation of a validation set: ``loss``, ``perplexity``, and ``change_since_start`` of the loss if
        the run has evaluated the set before its first step.

        Args:
            progress: of the run.
            name: of the set, or ``set/source`` for the part of a set that is from one source.
            values: numbers by name.
        """

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """Handle text that was generated from ``logging.sample_prompts``."""

    def save(self) -> None:
        """Flush the records, because a checkpoint is about to be written."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Handle the regular end of a run or a requested stop.

        Args:
            summary: ``finished`` (whether the token budget is used up), ``step``, ``tokens``, ``seconds``, and first,
                lowest and last losses by name; ``changes`` of validation losses since the start of the run, each with
                ``before``, ``after`` and ``change``; for JSON.
        """
