"""``{prefix}.rejects.jsonl``: the skipped records, each with its place and the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ....engine.files.outputs import open_new
from ....engine.files.paths import is_url
from ..dataset_files import REJECTS
from ..records.errors import Where, count_newlines
from ..workers.task_output import TaskOutput


def write_rejects(outputs: Sequence[TaskOutput], prefix: str, work: Path) -> list[str]:
    r"""Join the rejects of ``outputs`` to ``{prefix}.rejects.jsonl``; return the paths written, [] without rejects.

    Each line is ``{"where": "file:17", "reason": ..., "record": ...}``. The record is unchanged (bytes that are not
    UTF-8 as ``\\xff``). Of a line of more than 16 MB only the beginning is kept. null: the reader does not have it.
    """
    final = f"{prefix}{REJECTS}"
    rejects = [output.rejects for output in outputs if output.rejects.exists()]
    if not rejects:
        Path(final).unlink(missing_ok=True)
        return []
    places = _LineCounter()
    with open_new(work / "rejects") as joined:
        for path in rejects:
            with open(path, "rb") as file:
                for record in map(json.loads, file):
                    place = places.describe(Where(**record.pop("where")))
                    line = json.dumps({"where": place, **record}, ensure_ascii=False) + "\n"
                    joined.write(line.encode("utf-8", "backslashreplace"))
    os.replace(work / "rejects", final)
    return [final]


class _LineCounter:
    """Finds line numbers in one pass over each file, because rejects come in order."""

    def __init__(self) -> None:
        self._path, self._offset, self._lines = "", 0, 0

    def describe(self, where: Where) -> str:
        if where.unit != "line" or is_url(where.path):
            return where.describe()
        if where.path != self._path or where.offset < self._offset:
            self._path, self._offset, self._lines = where.path, 0, 0
        self._lines += count_newlines(where.path, self._offset, where.offset)
        self._offset = where.offset
        return f"{where.path}:{self._lines + where.number}"
