"""``{prefix}.rejects.jsonl``: the records that were skipped, where they stood and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ....engine.files.outputs import open_new
from ..dataset_files import REJECTS
from ..records.errors import Where, count_newlines
from ..workers.task_output import Shard


def write_rejects(shards: Sequence[Shard], prefix: str, work: Path) -> list[str]:
    """Join the shards' rejects to ``{prefix}.rejects.jsonl``; the paths written, none when there are none.

    A line of it: ``{"where": "file:17", "reason": ..., "record": ...}``; the record as it stood (bytes that are no
    UTF-8 as ``\\\\xff``), of lines of more than 16 MB the beginning, and null where the reader has none.
    """
    final = f"{prefix}{REJECTS}"
    if not any(shard.rejects.exists() for shard in shards):
        Path(final).unlink(missing_ok=True)
        return []
    places = _LineCounter()
    with open_new(work / "rejects") as file:
        for record in _records(shards):
            place = places.describe(Where(**record.pop("where")))
            line = json.dumps({"where": place, **record}, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))
    os.replace(work / "rejects", final)
    return [final]


def _records(shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        if shard.rejects.exists():
            with open(shard.rejects, "rb") as file:
                yield from map(json.loads, file)


class _LineCounter:
    """Finds line numbers in one pass over each file, since rejects come in order."""

    def __init__(self) -> None:
        self._path, self._offset, self._lines = "", 0, 0

    def describe(self, where: Where) -> str:
        if where.unit != "line":
            return where.describe()
        if where.path != self._path or where.offset < self._offset:
            self._path, self._offset, self._lines = where.path, 0, 0
        self._lines += count_newlines(where.path, self._offset, where.offset)
        self._offset = where.offset
        return f"{where.path}:{self._lines + where.number}"
