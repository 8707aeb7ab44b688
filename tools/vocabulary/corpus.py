"""The text that new tokens are learned from, and the tenth of its documents by which their gain is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from ...engine.errors import UserError
from ..ingest.formats import FORMATS
from ..ingest.inputs import STDIN, InputOptions, expand_inputs
from ..ingest.records import MalformedError, ReadContext, Where
from ..ingest.tasks import Span
from ..ingest.texts import TextChoice

HELD_OUT = 10
"""One document in so many is held out."""


def read_documents(
    inputs: Sequence[str],
    json_key: Sequence[str] = ("text",),
    txt_mode: str = "file",
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> Iterator[str]:
    """The texts of the files, in their order, up to a number of documents or bytes of UTF-8.

    Raises:
        UserError: a file cannot be read, or a record has no text.
    """
    if STDIN in inputs:
        raise UserError("--corpus -: name a file, a folder or a pattern")
    choice, num_documents, num_bytes = TextChoice.parse(json_key), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for file in expand_inputs(inputs, InputOptions(txt_mode=txt_mode), "--corpus"):
            form = FORMATS[file.format]
            span = Span(file, 0, file.units if form.split == "units" else file.size)
            for record in form.read(span, ReadContext(_refuse, Path(scratch))):
                try:
                    text = choice.text(record.value)
                except MalformedError as error:
                    raise UserError(f"--corpus {record.where.describe()}: {error}") from None
                for piece in [text] if isinstance(text, str) else text.pieces():
                    if num_documents == max_documents or (max_bytes is not None and num_bytes >= max_bytes):
                        return
                    num_bytes += len(piece.encode("utf-8", "replace"))
                    yield piece
                num_documents += 1


def is_held_out(text: str) -> bool:
    """By its content: equal documents fall on the same side, wherever they stand."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace")) % HELD_OUT == 0


def _refuse(where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
    raise UserError(f"--corpus {where.describe()}: {reason}; mend it")
