"""Compare added tokens with those in the files next to tokenizer.json, which transformers reads first.

Its classes for Qwen and Llama build the tokenizer from the vocabulary and merges of tokenizer.json and the added tokens
of tokenizer_config.json (``added_tokens_decoder``). Without that list they use added_tokens.json and tokenizer.json. A
token that only one of the files lists, or lists with another id, would have different ids in training and serving.
Special tokens that tokenizer.json lacks are ignored, because they do not occur in a dataset's text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import ADDED_TOKENS_FILE, CONFIG_FILES, read_config, token_text

_CONFIG_FILE, _SPECIAL_TOKENS_FILE = CONFIG_FILES


def require_agreement(file: Path, id_of: Callable[[str], int | None]) -> None:
    """Check that the files next to a tokenizer.json give added tokens the same ids.

    Args:
        file: the tokenizer.json.
        id_of: id of a token there.

    Raises:
        UserError: they give a token another id, or tokenizer.json lacks one that is matched in text.
    """
    config = read_config(file.with_name(_CONFIG_FILE))
    name, listed = _CONFIG_FILE, _decoder(config)
    if listed is None:
        name, listed = ADDED_TOKENS_FILE, []
        if added := read_config(file.with_name(ADDED_TOKENS_FILE)):
            # transformers matches these in text unless a setting names them as special.
            special_tokens = _named_special(config) | _named_special(read_config(file.with_name(_SPECIAL_TOKENS_FILE)))
            listed = [(text, number, text in special_tokens) for text, number in added.items() if type(number) is int]
    for content, token_id, special in listed:
        found = id_of(content)
        if found != token_id and not (found is None and special):
            there = "does not have it" if found is None else f"gives it the id {found}"
            raise UserError(
                f"{file.with_name(name)}: gives the added token {content!r} the id {token_id}, but {file.name} next to "
                f"it {there}; programs read only one of them: get both files from the model's source, or correct one "
                "of them"
            )


def unlisted(file: Path, matched: Collection[str]) -> list[str]:
    """Return the added tokens ``matched`` in text by a tokenizer.json that the list in tokenizer_config.json lacks.

    Empty if tokenizer_config.json has no such list.
    """
    listed = {content for content, _, _ in _decoder(read_config(file.with_name(_CONFIG_FILE))) or ()}
    return [content for content in matched if content not in listed] if listed else []


def _decoder(config: Mapping[str, Any]) -> list[tuple[str, int, bool]] | None:
    """Return content, id and whether it is special of each entry of ``added_tokens_decoder``; None without that
    list.
    """
    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return None
    found = []
    for key, entry in entries.items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(key).isdecimal():
            found.append((entry["content"], int(key), entry.get("special") is True))
    return found


def _named_special(config: Mapping[str, Any]) -> set[str]:
    """Return the tokens named by settings such as ``pad_token`` and ``additional_special_tokens``."""
    named: set[str] = set()
    for key, value in config.items():
        if not key.endswith(("_token", "_special_tokens")):
            continue
        if isinstance(value, dict) and "content" not in value:  # extra_special_tokens: names and tokens
            value = list(value.values())
        tokens = map(token_text, value if isinstance(value, list) else [value])
        named.update(token for token in tokens if token is not None)
    return named
