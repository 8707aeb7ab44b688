"""Where numbers go: a console line, ``metrics.jsonl`` and TensorBoard events, all in the run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from .tensorboard import TensorBoard

METRICS_FILE = "metrics.jsonl"


class MetricLog:
    """Writes records of one run on its main rank; on others it does nothing.

    A resumed run first forgets the records after the step that it continues from, so that the file always holds one
    curve.

    Args:
        run_folder: made when it is missing.
        resumed_step: records of later steps are dropped.
        active: whether this rank writes; such a rank calls :meth:`open` first.
        tensorboard: also write TensorBoard events.
        evaluates_again: the evaluations of ``resumed_step`` are dropped as well.
    """

    def __init__(
        self, run_folder: str | Path, resumed_step: int, active: bool, tensorboard: bool, evaluates_again: bool = False
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

    def open(self) -> None:
        """Make the run folder and open the files.

        Raises:
            OSError: the run folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        _forget_after(self._folder / METRICS_FILE, self._resumed_step, self._evaluates_again)
        self._file = (self._folder / METRICS_FILE).open("ab", buffering=0)
        if self._tensorboard:
            self._tensorboard_writer = TensorBoard(self._folder / "tensorboard", self._resumed_step + 1, self.say)

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


def _forget_after(path: Path, step: int, evaluates_again: bool) -> None:
    """Drop the records of steps after ``step``, its evaluations if they are made again, and an unfinished last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        recorded = record.get("step") if isinstance(record, dict) else None
        made_again = evaluates_again and recorded == step and "evaluation" in record
        if isinstance(recorded, int) and recorded <= step and not made_again:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
