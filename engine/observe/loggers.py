"""Where numbers go: a console line, ``metrics.jsonl`` and TensorBoard events, all in the run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from .curves import METRICS_FILE, TENSORBOARD_FOLDER, continue_curve, start_over
from .tensorboard import TensorBoard

__all__ = ["METRICS_FILE", "MetricLog"]


class MetricLog:
    """Writes records of one run on its main rank; on others it does nothing.

    ``metrics.jsonl`` always holds one curve: see :mod:`.curves` for the records of an earlier run or of steps that are
    made again.

    Args:
        run_folder: made when it is missing.
        resumed_step: step that the run continues from; None when it starts over.
        active: whether this rank writes; such a rank calls :meth:`open` first.
        tensorboard: also write TensorBoard events.
        evaluates_again: the evaluations of ``resumed_step`` are made again.
    """

    def __init__(
        self,
        run_folder: str | Path,
        resumed_step: int | None,
        active: bool,
        tensorboard: bool,
        evaluates_again: bool = False,
    ):
        self.active = active
        self._folder = Path(run_folder)
        self._resumed_step, self._evaluates_again = resumed_step, evaluates_again
        self._tensorboard = tensorboard
        self._file: BinaryIO | None = None
        self._pending = b""
        """Records that a full disk has not taken yet."""
        self._failing = False
        self._tensorboard_writer: TensorBoard | None = None

    def open(self, renamed_with_the_curve: tuple[str, ...] = ()) -> None:
        """Make the run folder and open the files; print which records were moved.

        Args:
            renamed_with_the_curve: names of further files of an earlier run, where this one starts over.

        Raises:
            OSError: the run folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._resumed_step is None:
            lines = start_over(self._folder, renamed_with_the_curve)
        else:
            lines = continue_curve(self._folder, self._resumed_step, self._evaluates_again)
        for line in lines:
            self.say(line)
        self._file = (self._folder / METRICS_FILE).open("ab", buffering=0)
        if self._tensorboard:
            first_step = 0 if self._resumed_step is None else self._resumed_step + 1
            self._tensorboard_writer = TensorBoard(self._folder / TENSORBOARD_FOLDER, first_step, self.say)

    def say(self, line: str) -> None:
        """Print a line for people."""
        if self.active:
            print(line, flush=True)

    def record(self, step: int, tokens: int, values: Mapping[str, Any], group: str = "train") -> None:
        """Keep ``values`` of ``step``; numbers become TensorBoard scalars named ``group/key``."""
        if self._file is None:
            return
        # JSON knows no NaN: a number that is not finite is kept as null.
        finite = {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()
        }
        self._pending += json.dumps({"step": step, "tokens": tokens, **finite}).encode() + b"\n"
        with self._tolerant():
            self._write_pending()
        if self._tensorboard_writer is not None:
            self._tensorboard_writer.record(step, values, group)

    def _write_pending(self) -> None:
        assert self._file is not None
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A full disk is reported once, and ends nothing: checkpoints decide on that. Records wait for space."""
        try:
            yield
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                reason = error.strerror or error
                self.say(f"note: {self._folder / METRICS_FILE} cannot be written now: {reason}; records wait for it")

    def sync(self) -> None:
        """Flush the records to disk: a checkpoint that survives must find those of its steps."""
        if self._file is not None:
            with self._tolerant():
                self._write_pending()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close everything."""
        if self._file is not None:
            with self._tolerant():
                self._write_pending()
            self._file.close()
        if self._tensorboard_writer is not None:
            self._tensorboard_writer.close()
