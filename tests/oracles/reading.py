"""Reading files as the workers of the preprocess command do, for tests to compare with other readers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from retemper.tools.ingest.formats import FORMATS
from retemper.tools.ingest.inputs import InputOptions, expand_inputs
from retemper.tools.ingest.long_text import LongText
from retemper.tools.ingest.readers import lines
from retemper.tools.ingest.records import ReadContext, Where
from retemper.tools.ingest.tasks import Span


@dataclass
class Reading:
    """What a reader gave, in order."""

    values: list[Any] = field(default_factory=list)
    """Of the records, long texts joined."""
    places: list[str] = field(default_factory=list)
    """Of the records: ``file:line``, the folder left out."""
    refused: list[str] = field(default_factory=list)
    """``file:line: reason [kind]`` of what was no record."""

    def refuse(self, where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
        """The reader's callback, which lets it go on."""
        self.refused.append(f"{short(where)}: {reason} [{kind}]")


def read_file(
    path: Path, cuts: Sequence[int] = (), columns: tuple[str, ...] | None = ("text",), txt_mode: str = "file"
) -> Reading:
    """Read a file in spans that ``cuts`` part, refusals being collected."""
    reading = Reading()
    for span, context in _spans(path, cuts, columns, txt_mode, reading):
        for record in FORMATS[span.file.format].read(span, context):
            reading.values.append(joined(record.value))
            reading.places.append(short(record.where))
            assert 0 <= context.consumed <= span.num_bytes
    return reading


def read_texts(path: Path, cuts: Sequence[int] = (), key: str = "text") -> Reading:
    """The same by the way that is taken for JSONL of which only one key is wanted; it gives no places."""
    reading = Reading()
    for span, context in _spans(path, cuts, (key,), "file", reading):
        reading.values += map(joined, lines.read_texts(span, context, key))
    return reading


def joined(value: Any) -> Any:
    """``value`` with its long texts read."""
    if isinstance(value, LongText):
        return "".join(value.pieces())
    if isinstance(value, dict):
        return {key: joined(item) for key, item in value.items()}
    return [joined(item) for item in value] if isinstance(value, list) else value


def short(where: Where) -> str:
    """A place as it is shown, without the folder."""
    return where.describe().removeprefix(os.path.dirname(where.path) + "/")


def _spans(path: Path, cuts: Sequence[int], columns: tuple[str, ...] | None, txt_mode: str, reading: Reading) -> Any:
    (file,) = expand_inputs([str(path)], InputOptions(txt_mode))
    end = file.units if FORMATS[file.format].split == "units" else file.size
    with tempfile.TemporaryDirectory() as scratch:
        for start, stop in pairwise((0, *cuts, end)):
            yield Span(file, start, stop), ReadContext(reading.refuse, Path(scratch), columns=columns)
            assert os.listdir(scratch) == [], "a temporary file was left"
