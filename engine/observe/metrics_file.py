"""Write ``metrics.jsonl``: one line of JSON for every reported step and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from ..files.atomic import sync_file
from ..schedule import Progress
from ..weights.checkpoint.run_record import CONFIG_FILE
from .curves import METRICS_FILE, archive_metrics, truncate_metrics
from .observer import Observer, StepRecord


class MetricsFile(Observer):
    """Writes records to ``metrics.jsonl``; :mod:`.curves` moves those of an earlier run and of repeated steps.

    Args:
        run_folder: created if it is missing.
        say: prints a line for people.
    """

    def __init__(self, run_folder: str | Path, say: Callable[[str], None]):
        self._folder, self._say = Path(run_folder), say
        self._file: BinaryIO | None = None
        self._pending = b""
        """Records that wait for space on a full disk."""
        self._failing = False

    def start(self, after_step: int | None, evaluates_again: bool = False) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`. Logs which records were moved."""
        self.end()
        self._folder.mkdir(parents=True, exist_ok=True)
        if after_step is None:
            lines = archive_metrics(self._folder, (CONFIG_FILE,))
        else:
            lines = truncate_metrics(self._folder, after_step, evaluates_again)
        for line in lines:
            self._say(line)
        self._file = (self._folder / METRICS_FILE).open("ab", buffering=0)

    def step(self, record: StepRecord) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._record(record.progress, record.values)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._record(progress, {"evaluation": name, **values})

    def save(self) -> None:
        """Flush the records to disk, so that a checkpoint always has the records of its steps."""
        if self._file is not None:
            with self._tolerant():
                self._write_pending()
                sync_file(self._file)

    def end(self, summary: Mapping[str, Any] | None = None) -> None:
        """Write the pending records and close the file."""
        if self._file is not None:
            with self._tolerant():
                self._write_pending()
            self._file.close()
            self._file = None

    def _record(self, progress: Progress, values: Mapping[str, Any]) -> None:
        # JSON has no NaN: non-finite numbers are written as null.
        finite = {
            key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()
        }
        record = {"step": progress.step, "tokens": progress.tokens, **finite}
        self._pending += json.dumps(record).encode() + b"\n"
        with self._tolerant():
            self._write_pending()

    def _write_pending(self) -> None:
        assert self._file is not None
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Report a full disk once and keep the records; only a failed checkpoint may end the run."""
        try:
            yield
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                reason = error.strerror or error
                self._say(f"note: {self._folder / METRICS_FILE} cannot be written now: {reason}; records wait for it")
