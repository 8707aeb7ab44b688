"""Write ``metrics.jsonl``, one line of JSON for every reported step and evaluation, and ``samples.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from ..files.atomic import sync_file
from ..schedule import Progress
from ..weights.checkpoint.run_record import CONFIG_FILE
from .curves import METRICS_FILE, SAMPLES_FILE, archive_metrics, truncate_records
from .observer import Observer, Sample, StepRecord


class RecordsFile(Observer):
    """A file of records in the run folder.

    Args:
        run_folder: created if it is missing.
        name: of the file.
        say: prints a line for people.
    """

    def __init__(self, run_folder: str | Path, name: str, say: Callable[[str], None]):
        self._folder, self._name, self._say = Path(run_folder), name, say
        self._file: BinaryIO | None = None
        self._pending = b""
        """Records that wait for space on a full disk."""
        self._failing = False

    def start(self, after_step: int | None, evaluates_again: bool = False) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`. Logs which records were moved."""
        self.end()
        if after_step is not None:
            for line in truncate_records(self._folder, self._name, after_step, evaluates_again):
                self._say(line)

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

    def _open(self) -> None:
        self._file = (self._folder / self._name).open("ab", buffering=0)

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
        if self._file is None:
            self._open()
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
                self._say(f"note: {self._folder / self._name} cannot be written now: {reason}; records wait for it")


class MetricsFile(RecordsFile):
    """Writes ``metrics.jsonl``: steps and evaluations. :mod:`.curves` moves the records of an earlier run."""

    def __init__(self, run_folder: str | Path, say: Callable[[str], None]):
        super().__init__(run_folder, METRICS_FILE, say)

    def start(self, after_step: int | None, evaluates_again: bool = False) -> None:
        """See :class:`RecordsFile`. The file is opened at once: a run must be able to write it."""
        super().start(after_step, evaluates_again)
        self._folder.mkdir(parents=True, exist_ok=True)
        if after_step is None:
            for line in archive_metrics(self._folder, (CONFIG_FILE,)):
                self._say(line)
        self._open()

    def step(self, record: StepRecord) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._record(record.progress, record.values)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._record(progress, {"evaluation": name, **values})


class SamplesFile(RecordsFile):
    """Writes ``samples.jsonl``: generated text. The file exists only if there is some."""

    def __init__(self, run_folder: str | Path, say: Callable[[str], None]):
        super().__init__(run_folder, SAMPLES_FILE, say)

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        for sample in samples:
            self._record(progress, sample._asdict())
