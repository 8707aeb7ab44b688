"""Write TensorBoard events. Errors of its libraries never end a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..schedule import Progress
from .curves import TENSORBOARD_FOLDER
from .observer import Observer, StepRecord


class TensorBoard(Observer):
    """Writes scalars until the first failure, which is logged once.

    Args:
        run_folder: the events go to a folder in it.
        say: prints a line for people.
    """

    def __init__(self, run_folder: str | Path, say: Callable[[str], None]):
        self._folder, self._say = Path(run_folder) / TENSORBOARD_FOLDER, say
        self._writer: Any = None

    def start(self, after_step: int | None, evaluates_again: bool = False) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`. Hides earlier records after ``after_step``."""
        self.end()
        with self._tolerant("cannot be used"):
            from torch.utils.tensorboard import SummaryWriter

            first_step = 0 if after_step is None else after_step + 1
            self._writer = SummaryWriter(str(self._folder), purge_step=first_step)

    def step(self, record: StepRecord) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._record(record.progress.step, record.values, "train")

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._record(progress.step, values, f"evaluation/{name}")

    def end(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write the pending events."""
        if self._writer is not None:
            with self._tolerant(f"cannot write to {self._folder}"):
                self._writer.close()
            self._writer = None

    def _record(self, step: int, values: Mapping[str, Any], group: str) -> None:
        """Write the numbers of ``values`` as scalars named ``group/key``."""
        if self._writer is None:
            return
        with self._tolerant(f"cannot write to {self._folder}"):
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{key}", value, step)
            self._writer.flush()

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        # Any exception of NumPy, protobuf, setuptools or a codec. Their import has also raised SystemExit.
        try:
            yield
        except (Exception, SystemExit) as error:
            self._writer = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(
                f"note: TensorBoard {what}: {reason}; training continues without it, metrics.jsonl has the same "
                "numbers (logging.tensorboard: false silences this)"
            )
