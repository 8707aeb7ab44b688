"""Define the options of extend_vocab.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.errors import UserError
from ...engine.weights.hugging_face.weight_options import DEFAULT_MAX_SHARD_SIZE, parse_shard_size

_COUNTS = ("num_tokens", "min_count", "max_characters", "max_documents", "max_bytes", "pad_vocab_to_multiple_of")


@dataclass(frozen=True)
class ExtendOptions:
    """The options on the command line.

    Raises:
        UserError: names the option, its value and the remedy.
    """

    model: str
    output: str
    corpus: Sequence[str] = ()
    num_tokens: int = 2000
    tokens: str | None = None
    json_key: Sequence[str] = ("text",)
    txt_mode: str = "file"
    max_documents: int | None = None
    max_bytes: int | None = None
    min_count: int = 10
    max_characters: int = 16
    pad_vocab_to_multiple_of: int | None = None
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE

    def __post_init__(self) -> None:
        if self.tokens is None and not self.corpus:
            raise UserError("--corpus or --tokens is needed: text to learn tokens from, or a list of them")
        parse_shard_size(self.max_shard_size)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
