"""Encode prompts as the documents of a run begin, and decode what the model adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from .backends import Reference
from .files import tokenizer_file_name, tokenizer_kind
from .frame import ids_of, read_tokenizer_frame
from .reference import open_reference
from .tiktoken_reference import TiktokenReference


class PromptTokenizer:
    """The tokenizer of a model, for prompts.

    Special tokens in a prompt are control tokens, except with sentencepiece, which has none in text.

    Args:
        folder: with the files of the tokenizer, which are read now.
        begin: ids at the beginning of the documents in training; None if unknown: those that the tokenizer adds.

    Raises:
        UserError: there is no tokenizer, or it cannot be used.
    """

    def __init__(self, folder: Path, begin: tuple[int, ...] | None):
        name = tokenizer_file_name({path.name for path in folder.iterdir()})
        if name is None:
            raise UserError(f"{folder}: no tokenizer")
        file = folder / name
        special = tokenizer_kind(file) != "sentencepiece"
        self._reference: Reference
        self._reference, _ = open_reference(name, file, allow_special_tokens=special)
        if begin is None:
            names = self._reference.special_tokens if isinstance(self._reference, TiktokenReference) else None
            begin = ids_of(read_tokenizer_frame(file, names).documents_begin_with("auto"))
        self._begin = list(begin)
        self.document_end: int | None = None
        """Id of the token that ends documents; None if the tokenizer does not say."""
        with suppress(UserError):
            _, self.document_end = self._reference.document_end(None)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of ``prompt`` after the beginning of a document, which is not doubled; empty for no text."""
        ids = [int(token) for token in self._reference.encode([prompt])[0]]
        return ids if not ids or ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def continuation(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """Return the text of ``new_ids`` after the prompt: decoded alone, some tokenizers drop its leading space."""
        prompt, whole, alone = (
            self._reference.decode(list(ids), False) for ids in (prompt_ids, [*prompt_ids, *new_ids], new_ids)
        )
        return whole[len(prompt) :] if whole.startswith(prompt) else alone
