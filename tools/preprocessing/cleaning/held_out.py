"""Reads the texts that ``--held-out`` keeps out of the training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....engine.errors import UserError
from ..formats import FORMATS
from ..inputs.files import STDIN, InputFile, InputOptions, expand_inputs
from ..records.errors import MalformedError, Where
from ..records.long_text import LongText
from ..records.reading import ReadContext, ReadOptions
from ..records.text_choice import TextChoice
from ..workers.tasks import Span
from .cleaner import Cleaner
from .decontamination import NgramFilter


def read_held_out(
    files: Sequence[InputFile],
    choice: TextChoice,
    cleaner: Cleaner,
    folder: Path,
    reading: ReadOptions,
) -> NgramFilter:
    """Return the n-grams of the texts in ``files``; ``folder`` is for temporary files.

    Records are read and cleaned like those of the corpus. Of records without the corpus's text key all strings are
    used, also nested ones, because test sets name their texts differently. ``--sheet`` is ignored; damage is an error.

    Raises:
        UserError: a file cannot be read, or none contains text.
    """
    reading = replace(reading, sheets=(), skip_damage=False)
    ngrams = NgramFilter.build(_texts(files, choice, cleaner, folder, reading))
    if ngrams.num_ngrams == 0:
        names = " ".join(file.path for file in files)
        raise UserError(f"--held-out {names}: no text in it; name files with the texts to keep out")
    return ngrams


def held_out_files(paths: Sequence[str], choice: TextChoice) -> list[InputFile]:
    """Return the files that ``--held-out`` names. Raise UserError if one is missing or of unknown format."""
    if STDIN in paths:
        raise UserError("--held-out -: standard input is for the corpus; name a file")
    return expand_inputs(paths, InputOptions(keys=choice.roots), "--held-out")


def _texts(
    files: Sequence[InputFile], choice: TextChoice, cleaner: Cleaner, folder: Path, reading: ReadOptions
) -> Iterator[str]:
    for file in files:
        context = ReadContext(_refuse, folder, options=reading)
        stop = file.units if FORMATS[file.format].split == "units" else file.size
        for record in FORMATS[file.format].read(Span(file, 0, stop), context):
            try:
                texts = [choice.text(record.value)]
            except MalformedError:
                texts = list(_strings(record.value))
            for text in texts:
                yield cleaner.cleaned(text if isinstance(text, str) else "".join(text.pieces()))


def _strings(value: Any) -> Iterator[str | LongText]:
    """Yield all strings in a record, at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (str, LongText)):
            yield value
        elif isinstance(value, (dict, list)):
            waiting.extend(reversed(list(value.values()) if isinstance(value, dict) else value))


def _refuse(where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
    raise UserError(f"--held-out {where.describe()}: {reason}; fix it")
