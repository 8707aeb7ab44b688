"""Write the records of a run as CSV: ``train.csv`` and ``evaluation.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ...files.atomic import replace_file
from ...schedule import Progress
from ..curves import read_metrics
from ..observer import Observer, RunDescription, StepRecord
from .facts import TRACKERS_FOLDER

FOLDER = "csv"
_KINDS = (("train", False), ("evaluation", True))
"""Names of the files, and whether they hold evaluations."""
_Row = Mapping[str, Any]


class CsvFiles(Observer):
    """Writes to ``{run_folder}/trackers/csv``. At every start the files are made again from metrics.jsonl."""

    def __init__(self) -> None:
        self._run_folder = Path()
        self._tables: dict[str, _Table] = {}

    def open(self, run: RunDescription) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._run_folder = run.folder

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        folder = self._run_folder / TRACKERS_FOLDER / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        records = [] if after_step is None else list(read_metrics(self._run_folder, after_step))
        of_kind = {
            kind: [one for one in records if ("evaluation" in one) is is_evaluation] for kind, is_evaluation in _KINDS
        }
        self._tables = {kind: _Table(folder / f"{kind}.csv", rows) for kind, rows in of_kind.items()}

    def step(self, record: StepRecord) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._tables["train"].add(_row(record.progress, record.values))

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._tables["evaluation"].add(_row(progress, {"evaluation": name, **values}))


def _row(progress: Progress, values: Mapping[str, Any]) -> _Row:
    """Return a record as in metrics.jsonl, without non-finite numbers."""
    finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in values.items()}
    return {"step": progress.step, "tokens": progress.tokens, **finite}


class _Table:
    """A file of rows. It is written again as a whole when a row has a new column."""

    def __init__(self, path: Path, rows: Sequence[_Row] = ()):
        self._path = path
        self._columns: list[str] = []
        self._write(rows)

    def add(self, row: _Row) -> None:
        if set(row) <= set(self._columns):
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._lines([row]))
        else:
            with self._path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            self._write([*rows, row])

    def _write(self, rows: Sequence[_Row]) -> None:
        self._columns = list(dict.fromkeys(column for row in rows for column in row))
        header = [dict(zip(self._columns, self._columns, strict=True))] if self._columns else []
        replace_file(self._path, [self._lines([*header, *rows]).encode()])

    def _lines(self, rows: Sequence[_Row]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()
