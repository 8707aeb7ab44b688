"""The protocol of the observers of a run.

The training loop does not know them. Another one (a tracker, a user's callback) implements :class:`Observer` and is
added to :func:`~retemper.engine.observe.reporter.create_observers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..schedule import Progress


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


class Observer(Protocol):
    """Receives the events of a run, on rank 0 only."""

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
        """Handle an evaluation of the validation set ``name``: ``loss`` and ``perplexity``."""

    def save(self) -> None:
        """Flush the records, because a checkpoint is about to be written."""

    def end(self) -> None:
        """Handle the regular end of a run or a requested stop."""
