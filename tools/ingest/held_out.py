"""The texts that ``--held-out`` keeps out of the training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...engine.errors import UserError
from .cleaning import Cleaner
from .decontamination import NgramFilter
from .formats import FORMATS
from .inputs import InputOptions, expand_inputs
from .records import MalformedError, ReadContext, Where
from .tasks import Span
from .texts import TextChoice


def write_held_out(paths: Sequence[str], choice: TextChoice, cleaner: Cleaner, folder: Path) -> Path:
    """Write the n-grams of the texts in ``paths`` to a file in ``folder``, for the workers.

    Records are read as those of the corpus are, cleaned by ``cleaner``; of those without the corpus's text key, all
    strings are taken: test sets call their texts by many names.

    Raises:
        UserError: a file cannot be read, or there is no text in any.
    """
    ngrams = NgramFilter.build(_texts(paths, choice, cleaner, folder))
    if ngrams.num_ngrams == 0:
        raise UserError(f"--held-out {' '.join(paths)}: no text in it; name files with the texts to keep out")
    file = folder / "held-out.npy"
    ngrams.save(file)
    return file


def _texts(paths: Sequence[str], choice: TextChoice, cleaner: Cleaner, folder: Path) -> Iterator[str]:
    for file in expand_inputs(paths, InputOptions()):
        context = ReadContext(_refuse, folder)
        stop = file.units if FORMATS[file.format].split == "units" else file.size
        for record in FORMATS[file.format].read(Span(file, 0, stop), context):
            try:
                texts = [choice.text(record.value)]
            except MalformedError:
                assert isinstance(record.value, dict)
                texts = [value for value in record.value.values() if isinstance(value, str)]
            for text in texts:
                yield cleaner.clean(text if isinstance(text, str) else "".join(text.pieces()))[0]


def _refuse(where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
    raise UserError(f"--held-out {where.describe()}: {reason}; mend it")
