"""What is told about a run: the protocol of its observers, and the one place where they are created.

The loop does not know them. A further one (a tracker, a user's callback) implements :class:`Observer` and is added to
:func:`create_observers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..config.settings import RunConfig
from ..run_state import Progress
from .metrics_file import MetricsFile
from .progress import step_line
from .tensorboard import TensorBoard

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


class ConsoleLines:
    """Prints a line for each reported step and evaluation."""

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
    """Return the observers that ``config`` asks for; ``say`` prints a line for people."""
    folder = Path(config.run_folder)
    observers: list[Observer] = [MetricsFile(folder, say)]
    if config.logging.tensorboard:
        observers.append(TensorBoard(folder, say))
    return [*observers, ConsoleLines(say)]
