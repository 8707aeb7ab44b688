"""Read the text that new tokens are learned from, and select the held-out tenth that measures their gain."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from ...engine.errors import UserError
from ..preprocessing.formats import FORMATS
from ..preprocessing.inputs.files import STDIN, InputOptions, expand_inputs
from ..preprocessing.records.errors import MalformedError, Where
from ..preprocessing.records.reading import ReadContext
from ..preprocessing.records.text_choice import TextChoice
from ..preprocessing.workers.tasks import Span

HELD_OUT = 10
"""One of this many documents is held out."""


def read_documents(
    inputs: Sequence[str],
    json_key: Sequence[str] = ("text",),
    txt_mode: str = "file",
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> Iterator[str]:
    """Yield the texts of the files, in their order, up to a number of documents or bytes of UTF-8.

    Raises:
        UserError: a file cannot be read, or a record has no text.
    """
    if STDIN in inputs:
        raise UserError("--corpus -: name a file, a folder or a pattern")
    choice, num_documents, num_bytes = TextChoice.parse(json_key), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for file in expand_inputs(inputs, InputOptions(txt_mode, keys=choice.roots), "--corpus"):
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
    """Return whether ``text`` is held out. It depends only on the content, so equal documents are on the same side."""
    return _digest(text) % HELD_OUT == 0


class CorpusSample:
    """A bounded sample of documents, in their order.

    It keeps all documents while their total length is small enough, then every second one by content, every fourth, and
    so on. So the sample covers the whole corpus. Only a single document may exceed the limit.

    Args:
        max_characters: limit of the total length.
    """

    def __init__(self, max_characters: int):
        self.texts: list[str] = []
        self.one_in = 1
        """About one of this many documents is kept."""
        self._max_characters, self._characters = max_characters, 0

    def add(self, text: str) -> None:
        """Keep ``text`` if it is in the sample."""
        if not self._is_chosen(text):
            return
        self.texts.append(text)
        self._characters += len(text)
        while self._characters > self._max_characters and len(self.texts) > 1:
            self.one_in *= 2
            self.texts = [kept for kept in self.texts if self._is_chosen(kept)] or self.texts[:1]
            self._characters = sum(map(len, self.texts))

    def _is_chosen(self, text: str) -> bool:
        return _digest(text) // HELD_OUT % self.one_in == 0


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))


def _refuse(where: Where, reason: str, kind: str, raw: bytes | str | None) -> None:
    raise UserError(f"--corpus {where.describe()}: {reason}; fix it")
