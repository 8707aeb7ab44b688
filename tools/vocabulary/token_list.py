"""Read the file of ``extend_vocab.py --tokens``: plain lines, JSON lines, a JSON list, or a vocabulary.json of this
tool.

A plain line is the token itself, spaces included. A line that is a JSON string, or a JSON object with ``text``,
``piece``, ``token`` or ``content``, names one. Anything else that looks like JSON is refused: it would become a token
such as ``{"piece": "...``, which no text contains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...engine.errors import UserError
from ...engine.files.regular import read_regular

_MOST_BYTES = 1 << 30
_KEYS = ("text", "piece", "token", "content")
"""Keys for the token in an object, in order of preference. A ``piece`` is written as in a vocabulary (``Ġthe``)."""
_LOOKS_LIKE_JSON = re.compile(r"""\s*(?:\{\s*["'][^"']*["']\s*:|\[\s*["'{]|".+"\s*,?\s*\Z)""", re.DOTALL)
_FORMATS = 'one token per line, a JSON string or {"text": "..."} per line, a JSON list of these, or a vocabulary.json'


@dataclass(frozen=True)
class Listed:
    """A token of the list."""

    text: str
    is_piece: bool
    """True if it is written as in a vocabulary."""
    place: str
    """Place in the file, such as ``line 3``."""


def read_list(path: str) -> list[Listed]:
    """Return the tokens of a file.

    Raises:
        UserError: it cannot be read, has no tokens, or holds JSON that does not list tokens.
    """
    try:
        # Some editors begin a file with a byte-order mark. Only line feeds end lines: a token may contain U+2028.
        content = read_regular(path, _MOST_BYTES, pipe=True).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tokens {path}: cannot be read: {error}") from None
    listed = _of_json_file(content, path)
    if listed is None:
        lines = (line.removesuffix("\r") for line in content.split("\n"))
        listed = [_of_line(line, f"line {number}", path) for number, line in enumerate(lines, 1) if line]
    if not listed:
        raise UserError(f"--tokens {path}: holds no token; write {_FORMATS}")
    return listed


def texts_of(listed: list[Listed], text_of_piece: Callable[[str], str], path: str) -> list[str]:
    """Return the texts of the listed tokens.

    Args:
        listed: from :func:`read_list`.
        text_of_piece: text of an entry of the tokenizer's vocabulary.
        path: of the file, for messages.

    Raises:
        UserError: a token is named twice.
    """
    places: dict[str, str] = {}
    for token in listed:
        text = text_of_piece(token.text) if token.is_piece else token.text
        if text in places:
            raise UserError(f"--tokens {path}: {token.place} repeats {text!r} of {places[text]}; list each token once")
        places[text] = token.place
    return list(places)


def _of_json_file(content: str, path: str) -> list[Listed] | None:
    """Return the tokens if the whole file is one JSON value that lists them; None if it is to be read by lines."""
    if content.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and isinstance(value.get("tokens"), list):
        entries = [entry for entry in value["tokens"] if not _is_part(entry)]
    elif isinstance(value, list) and any(isinstance(entry, (str, dict)) for entry in value):
        entries = value
    else:
        return None
    return [_of_value(entry, f"token {number}", path) for number, entry in enumerate(entries, 1)]


def _of_line(line: str, place: str, path: str) -> Listed:
    if _LOOKS_LIKE_JSON.match(line):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"--tokens {path}: {place} looks like JSON but is not valid: {error}; write {_FORMATS}"
            ) from None
        return _of_value(value, place, path)
    return Listed(line, False, place)


def _of_value(value: Any, place: str, path: str) -> Listed:
    if isinstance(value, str) and value:
        return Listed(value, False, place)
    if isinstance(value, dict):
        for key in _KEYS:
            if isinstance(value.get(key), str) and value[key]:
                return Listed(value[key], key == "piece", place)
    shown = json.dumps(value, ensure_ascii=False)[:60]
    raise UserError(f"--tokens {path}: {place} is JSON without a token, {shown}; write {_FORMATS}")


def _is_part(entry: Any) -> bool:
    """Return whether the entry is an intermediate step to other tokens, which are listed too, or a part of a
    character.
    """
    return isinstance(entry, dict) and (entry.get("kind") == "part" or "\ufffd" in str(entry.get("text")))
