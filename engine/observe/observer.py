"""The protocol of the observers of a run.

The training loop does not know them. Another one (a tracker, a user's callback) implements :class:`Observer` and is
added to :func:`~retemper.engine.observe.reporter.create_observers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from ..schedule import Progress

Say = Callable[[str], None]


class StepRecord(NamedTuple):
    """A step that is reported: every ``logging.log_interval`` steps, the first and the last one."""

    progress: Progress
    """After the step."""
    values: dict[str, Any]
    """Numbers by name: loss, learning rate, gradient norm, speed, memory, ..."""
    remaining_steps: int
    seconds_left: float
    """Estimated, until the end of the run."""
    remarks: list[str]
    """Lines about ranks that keep the others waiting."""


class Observer(Protocol):
    """What is told about a run, on its main rank only."""

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """The run begins or continues. Called again when it has been rolled back.

        Args:
            after_step: the step that it continues from; None when it starts from scratch.
            evaluates_again: whether the evaluations of ``after_step`` are made again.

        Raises:
            OSError: the run folder cannot be written.
        """

    def step(self, record: StepRecord) -> None:
        """A step has been made."""

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """The validation set ``name`` has been evaluated: ``loss`` and ``perplexity``."""

    def save(self) -> None:
        """A checkpoint is about to be written: what was recorded so far must survive where the checkpoint does."""

    def end(self) -> None:
        """The run has ended as planned or as asked."""
