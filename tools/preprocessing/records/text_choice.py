"""From a record to the text of a document: which of its values, joined how, and the fields kept beside it."""

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
    """What ``--json-key`` says: the keys whose strings make the text, or a template with keys in braces."""

    keys: tuple[str, ...]
    template: str | None = None

    @staticmethod
    def parse(arguments: Sequence[str]) -> TextChoice:
        """From the arguments of ``--json-key``.

        Raises:
            UserError: a template that is none, or beside other keys.
        """
        templates = [argument for argument in arguments if "{" in argument]
        if not templates:
            return TextChoice(tuple(arguments))
        if len(arguments) > 1:
            raise UserError(f"--json-key {' '.join(arguments)}: give several keys or one template, not both")
        try:
            parts = list(string.Formatter().parse(templates[0]))
        except ValueError as error:
            raise UserError(f"--json-key {templates[0]}: no template: {error}; write literal braces twice") from None
        keys = [field for _, field, _, _ in parts if field is not None]
        if not keys or any(not key or spec or conversion for _, key, spec, conversion in parts if key is not None):
            raise UserError(f"--json-key {templates[0]}: a template names keys in braces, like '{{title}}: {{text}}'")
        return TextChoice(tuple(dict.fromkeys(keys)), templates[0])

    @property
    def roots(self) -> tuple[str, ...]:
        """Names at the top of a record that any of the keys may begin with."""
        return tuple(dict.fromkeys(name for key in self.keys for name in (key, key.partition(".")[0])))

    def text(self, value: dict[str, Any] | str | LongText) -> str | LongText:
        """The text of a record; of a format that has no keys, the text that it is.

        Raises:
            MalformedError: a key is missing, or its value is no string; a template takes numbers too.
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
    """The value under ``key``, or under the path that its dots make of it.

    Raises:
        MalformedError: there is none.
    """
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
    """A line of JSON with those of ``keys`` that the record has.

    Raises:
        MalformedError: a value is no JSON (a date of Excel becomes text; bytes of Parquet are refused).
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
    """`` (here perhaps: content)`` where one of ``names`` is a usual name of a text, else nothing."""
    there = set(names)
    found = next((name for name in _USUAL_KEYS if name in there), None)
    return f" (here perhaps {found})" if found else ""


def json_type(value: Any) -> str:
    """What JSON calls a value of this type, with its article."""
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
