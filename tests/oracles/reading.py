"""Reading files as the workers of the preprocess command do, for tests to compare with other readers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from retemper.tools.preprocessing.formats import FORMATS
from retemper.tools.preprocessing.inputs.files import InputOptions, expand_inputs
from retemper.tools.preprocessing.records.errors import MalformedError, Where
from retemper.tools.preprocessing.records.long_text import LongText
from retemper.tools.preprocessing.records.reading import ReadContext, ReadOptions, readable_part
from retemper.tools.preprocessing.records.text_choice import TextChoice
from retemper.tools.preprocessing.workers.tasks import Span


@dataclass
class Reading:
    """What a reader gave, in order."""

    values: list[Any] = field(default_factory=list)
    """Of the records, long texts joined."""
    places: list[str] = field(default_factory=list)
    """Of the records: ``file:line``, the folder left out."""
    refused: list[str] = field(default_factory=list)
    """``file:line: reason [kind]`` of what was no record."""
    notes: list[str] = field(default_factory=list)
    """What else the reader reports."""

    def refuse(self, where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
        """The reader's callback, which lets it go on."""
        self.refused.append(f"{short(where)}: {reason} [{kind}]")


def read_file(
    path: Path,
    cuts: Sequence[int] = (),
    columns: tuple[str, ...] | None = ("text",),
    txt_mode: str = "file",
    input_format: str | None = None,
    **options: Any,
) -> Reading:
    """Read a file in spans that ``cuts`` part, refusals being collected; ``options`` are those of ``ReadOptions``."""
    reading = Reading()
    inputs = InputOptions(
        txt_mode, input_format=input_format, keys=columns, skip_damage=options.get("skip_damage", False)
    )
    for span, context in _spans(path, cuts, columns, inputs, reading, ReadOptions(**options)):
        records = FORMATS[span.file.format].read(span, context)
        for record in readable_part(records, str(path), context):
            reading.values.append(joined(record.value))
            reading.places.append(short(record.where))
            assert 0 <= context.consumed <= span.num_bytes
    return reading


def read_texts(path: Path, cuts: Sequence[int] = (), key: str = "text", input_format: str | None = None) -> Reading:
    """The texts under ``key`` of the records of a file, as workers take them."""
    reading = Reading()
    choice = TextChoice((key,))
    inputs = InputOptions(input_format=input_format)
    for span, context in _spans(path, cuts, choice.roots, inputs, reading, ReadOptions()):
        for value, where, raw in FORMATS[span.file.format].read(span, context):
            try:
                reading.values.append(joined(choice.text(value)))
            except MalformedError as error:
                context.refuse(where, str(error), error.kind, raw)
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


def _spans(
    path: Path,
    cuts: Sequence[int],
    columns: tuple[str, ...] | None,
    inputs: InputOptions,
    reading: Reading,
    options: ReadOptions,
) -> Iterator[tuple[Span, ReadContext]]:
    (file,) = expand_inputs([str(path)], inputs)
    end = file.units if FORMATS[file.format].split == "units" else file.size
    with tempfile.TemporaryDirectory() as scratch:
        for start, stop in pairwise((0, *cuts, end)):
            context = ReadContext(
                reading.refuse, Path(scratch), columns=columns, options=options, note=reading.notes.append
            )
            yield Span(file, start, stop), context
            assert os.listdir(scratch) == [], "a temporary file was left"
