"""Load a tokenizer with the library of its format, which defines its ids.

A tokenizer is one file: a Hugging Face ``tokenizer.json``, a sentencepiece ``.model`` or a ``.tiktoken``.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..files.regular import read_regular
from .added_tokens import require_agreement
from .backends import MAX_ID, Reference, SentencePieceReference, TokenizersReference
from .files import tokenizer_kind, tokenizer_sha256
from .tiktoken_reference import TiktokenReference


def open_reference(name: str, file: Path, allow_special_tokens: bool = False) -> tuple[Reference, str]:
    """Read and load the tokenizer ``file``, and check it against the files next to it.

    Returns:
        The tokenizer, and the SHA-256 in hexadecimal of its file, for a .tiktoken also of the JSON file that describes
        it.

    Raises:
        UserError: the file cannot be read or is not such a tokenizer, its library is not installed, an id is too large
            for a dataset, or files next to it give added tokens other ids.
    """
    content, description = _read(file), None
    beside = file.with_suffix(".json")
    if tokenizer_kind(file) == "tiktoken" and beside.exists():
        description = _read(beside)
    reference = load_reference(name, file, content, description, allow_special_tokens)
    if isinstance(reference, TokenizersReference):
        require_agreement(file, reference.id_of)
    if reference.vocab_size > MAX_ID + 1:
        raise UserError(
            f"{file}: has a token of id {reference.vocab_size - 1:,}, but datasets hold ids up to {MAX_ID:,}; renumber "
            "its tokens, or use another tokenizer"
        )
    return reference, tokenizer_sha256(content, description)


def _read(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def load_reference(
    name: str, file: Path, content: bytes, description: bytes | None, allow_special_tokens: bool = False
) -> Reference:
    """Load the tokenizer with the library of the format of ``file``.

    Args:
        name: for messages.
        file: its suffix determines the format; files next to it may be read.
        content: of ``file``.
        description: content of the JSON file next to a .tiktoken, if there is one.
        allow_special_tokens: whether special tokens written in a text become control tokens.

    Raises:
        UserError: the content is not such a tokenizer, its library is not installed, or special tokens are allowed for
            sentencepiece, which has none in text.
    """
    kind = tokenizer_kind(file)
    if kind == "tiktoken":
        return TiktokenReference(name, file, content, description, allow_special_tokens)
    if kind == "tokenizer.json":
        return TokenizersReference(name, file, content, allow_special_tokens)
    if allow_special_tokens:
        raise UserError(
            f"{name}: --allow-special-tokens does not apply to a sentencepiece model, which never makes control pieces "
            "from text; leave it out, or use the model's tokenizer.json"
        )
    return SentencePieceReference(name, file, content)
