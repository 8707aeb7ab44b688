"""Load a ``tokenizer.json``, for every part of the project that needs the ``tokenizers`` library's object.

A file may have been saved with the state of one training run or one call: BPE dropout, which gives random ids,
truncation, which cuts texts, and padding. These do not describe the tokenizer, so all are switched off here. Nothing
else in the project may call ``Tokenizer.from_file``, ``from_str`` or ``from_buffer``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def parse_tokenizer(content: bytes | str, where: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json``, with BPE dropout, truncation and padding off.

    Args:
        content: of the file.
        where: its path, for messages.

    Raises:
        UserError: the library cannot read it, or gives other ids each time it is loaded.
    """
    from tokenizers import Tokenizer

    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        tokenizer = deterministic(Tokenizer.from_str(text))
    except Exception as error:  # the library raises bare Exception for a file that it cannot parse
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: the tokenizers library cannot read this tokenizer: {reason}") from error
    _require_distinct_forms(tokenizer, where)
    return tokenizer


def _require_distinct_forms(tokenizer: Any, where: str | os.PathLike[str]) -> None:
    """Refuse added tokens with the same normalized form.

    The library (0.23) matches one of them in a text, and a different one each time the file is loaded.
    """
    if tokenizer.normalizer is None:
        return
    forms: dict[str, str] = {}
    for token in tokenizer.get_added_tokens_decoder().values():
        if not token.normalized:
            continue
        other = forms.setdefault(tokenizer.normalizer.normalize_str(token.content), token.content)
        if other != token.content:
            raise UserError(
                f"{where}: the added tokens {other!r} and {token.content!r} become the same text after normalization, "
                'so either may match in a text; remove one, or give one "normalized": false'
            )


def deterministic(tokenizer: Any) -> Any:
    """Switch off BPE dropout, truncation and padding of a ``tokenizers.Tokenizer``, and return it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer
