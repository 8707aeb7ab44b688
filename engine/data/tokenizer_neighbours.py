"""Added tokens in the files next to tokenizer.json: transformers reads those first, so they must say the same.

Its classes for Qwen and Llama build the tokenizer from the vocabulary and merges of tokenizer.json and the added tokens
of tokenizer_config.json (``added_tokens_decoder``), or without that list of added_tokens.json and tokenizer.json. A
token that only one of the files lists, or lists under another id, is trained on and served under different ids.
Special tokens that tokenizer.json lacks are left alone: no text of a dataset holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tokenizer_files import CONFIG_FILES, read_config

_CONFIG_FILE, _ADDED_FILE = CONFIG_FILES[0], "added_tokens.json"
_DECODER = "added_tokens_decoder"


def require_agreement(file: Path, id_of: Callable[[str], int | None]) -> None:
    """See that the files next to a tokenizer.json give added tokens its ids.

    Args:
        file: the tokenizer.json.
        id_of: id of a token there.

    Raises:
        UserError: they give one of them another id, or (one that is matched in text) tokenizer.json does not know it.
    """
    listed = [(_CONFIG_FILE, *entry) for entry in _decoder(file.parent)]
    if not isinstance(read_config(file.with_name(_CONFIG_FILE)).get(_DECODER), dict):
        # transformers matches these in text unless a setting names them as special.
        special_tokens = _named_special(file.parent)
        listed = [
            (_ADDED_FILE, content, token_id, content in special_tokens)
            for content, token_id in read_config(file.with_name(_ADDED_FILE)).items()
            if type(token_id) is int
        ]
    for name, content, token_id, special in listed:
        found = id_of(content)
        if found != token_id and not (found is None and special):
            there = "does not have it" if found is None else f"gives it the id {found}"
            raise UserError(
                f"{file.with_name(name)}: gives the added token {content!r} the id {token_id}, and {file.name} next to "
                f"it {there}; programs read one or the other: get both files from where the model came from, or "
                "correct one of them"
            )


def unlisted(file: Path, matched: Collection[str]) -> list[str]:
    """The added tokens that are ``matched`` in text by a tokenizer.json, and not listed by tokenizer_config.json next
    to it although that has a list."""
    listed = {content for content, _, _ in _decoder(file.parent)}
    return [content for content in matched if content not in listed] if listed else []


def _decoder(folder: Path) -> list[tuple[str, int, bool]]:
    """Content, id, and whether it is special, of each entry of ``added_tokens_decoder``."""
    entries: Any = read_config(folder / _CONFIG_FILE).get(_DECODER)
    found = []
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and str(key).isdecimal():
            found.append((entry["content"], int(key), entry.get("special") is True))
    return found


def _named_special(folder: Path) -> set[str]:
    """The tokens that settings such as ``pad_token`` and ``additional_special_tokens`` name."""
    named: set[str] = set()
    for name in CONFIG_FILES:
        for key, value in read_config(folder / name).items():
            if not key.endswith(("_token", "_special_tokens")):
                continue
            if isinstance(value, dict) and "content" not in value:  # extra_special_tokens: names and tokens
                value = list(value.values())
            for token in value if isinstance(value, list) else [value]:
                named.add(str(token.get("content") if isinstance(token, dict) else token))
    return named
