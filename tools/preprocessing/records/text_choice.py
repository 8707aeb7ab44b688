"""Takes the text of a document, and its metadata, from a record."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ....engine.errors import UserError
from .errors import MalformedError
from .long_text import LongText

_JOINED_BY = "\n\n"


@dataclass(frozen=True)
class TextChoice:
    """The parsed ``--json-key``: keys whose strings are joined, or a template with keys in braces."""

    keys: tuple[str, ...]
    template: str | None = None

    @staticmethod
    def parse(arguments: Sequence[str]) -> TextChoice:
        """Parse the arguments of ``--json-key``. Raise UserError for an invalid template, or one next to other keys."""
        templates = [argument for argument in arguments if "{" in argument]
        if not templates:
            return TextChoice(tuple(arguments))
        if len(arguments) > 1:
            raise UserError(f"--json-key {' '.join(arguments)}: give several keys or one template, not both")
        try:
            parts = list(string.Formatter().parse(templates[0]))
        except ValueError as error:
            raise UserError(f"--json-key {templates[0]}: not a template: {error}; write literal braces twice") from None
        keys = [field for _, field, _, _ in parts if field is not None]
        if not keys or any(not key or spec or conversion for _, key, spec, conversion in parts if key is not None):
            raise UserError(f"--json-key {templates[0]}: a template names keys in braces, like '{{title}}: {{text}}'")
        return TextChoice(tuple(dict.fromkeys(keys)), templates[0])

    @property
    def roots(self) -> tuple[str, ...]:
        """Top-level names with which any of the keys may begin."""
        return tuple(dict.fromkeys(name for key in self.keys for name in (key, key.partition(".")[0])))

    def text(self, value: dict[str, Any] | str | LongText) -> str | LongText:
        """Return the text of a record, or the record itself if it is a text.

        Raises:
            MalformedError: a key is missing, or its value is not a string. A template also accepts numbers.
        """
        if not isinstance(value, dict):
            return value
        if self.template is None and len(self.keys) == 1:
            only = self.keys[0]
            text = value.get(only)
            return text if type(text) is str else _string(look_up(value, only), only)
        values = {key: look_up(value, key) for key in self.keys}
        if self.template is None:
            return _JOINED_BY.join(_short(_string(found, key), key) for key, found in values.items())
        pieces = []
        for literal, key, _, _ in string.Formatter().parse(self.template):
            pieces.append(literal)
            if key is not None:
                found = values[key]
                number = isinstance(found, (int, float)) and not isinstance(found, bool)
                pieces.append(str(found) if number else _short(_string(found, key), key))
        return "".join(pieces)


def look_up(record: dict[str, Any], key: str) -> Any:
    """Return the value of ``key``, else of the path with dots. Raise MalformedError if there is none."""
    if key in record:
        return record[key]
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            keys = ", ".join(map(repr, list(record)[:8])) or "none"
            raise MalformedError(
                f"no key {key!r} (keys there: {keys}); name the text's key with --json-key{suggested_key(record)}"
            )
        value = value[name]
    return value


def metadata_line(value: dict[str, Any] | str | LongText, keys: Sequence[str]) -> bytes:
    """Return a line of JSON with those of ``keys`` that the record has.

    Raises:
        MalformedError: a value cannot be JSON. (A date of Excel becomes text; bytes of Parquet are refused.)
    """
    kept: dict[str, Any] = {}
    if isinstance(value, dict):
        for key in keys:
            try:
                kept[key] = look_up(value, key)
            except MalformedError:
                continue
    default = str if not any(isinstance(v, bytes) for v in kept.values()) else None
    try:
        return orjson.dumps(kept, default=default) + b"\n"
    except (TypeError, orjson.JSONEncodeError) as error:
        if "64-bit" not in str(error):
            raise MalformedError(f"metadata {', '.join(kept)}: {error}") from None
    try:
        text = json.dumps(kept, default=default, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedError(f"metadata {', '.join(kept)}: {error}") from None


_USUAL_KEYS = ("text", "content", "raw_content", "body", "document", "article", "passage", "page_content", "markdown")


def suggested_key(names: Iterable[str]) -> str:
    """Return `` (here perhaps content)`` if one of ``names`` is a usual name of the text, else an empty string."""
    there = set(names)
    found = next((name for name in _USUAL_KEYS if name in there), None)
    return f" (here perhaps {found})" if found else ""


def json_type(value: Any) -> str:
    """Return the JSON name of the value's type, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}")


def _string(value: Any, key: str) -> str | LongText:
    if type(value) is not str and type(value) is not LongText:
        raise MalformedError(f"the value of {key!r} is {json_type(value)}, not a string")
    return value


def _short(value: str | LongText, key: str) -> str:
    if isinstance(value, LongText):
        raise MalformedError(f"the value of {key!r} is too long to be joined with others; make it the only key")
    return value
