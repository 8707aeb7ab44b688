"""Parses JSON records strictly, and explains what is wrong with invalid ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import orjson

from .errors import MalformedError

_LARGE = 2.0**63
_NO_NUMBERS = ("NaN", "Infinity", "-Infinity")


class WantedKeys:
    """Keys that may occur only once in an object: parsers disagree on which of two to take.

    A repeated key is noticed if both are written in the same way, with or without escapes.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        names = dict.fromkeys(name for key in keys for name in (key, *key.split(".")))
        self._spellings = {name: tuple({orjson.dumps(name), json.dumps(name).encode("ascii")}) for name in names}

    def values(self, record: dict[str, Any]) -> Iterable[Any]:
        """Return the values of the wanted keys in ``record``; without wanted keys, all values."""
        return [record[name] for name in self._spellings if name in record] if self._spellings else record.values()

    def are_plain(self, record: Any, content: bytes | memoryview) -> bool:
        """Return True if ``record``, parsed from ``content``, needs no further check: each wanted key occurs once, with
        a string, as in most corpora.
        """
        if type(record) is not dict or not self._spellings:
            return False
        longest = 0
        for name, spellings in self._spellings.items():
            value = record.get(name)
            if type(value) is not str or len(spellings) > 1:
                return False
            longest = max(longest, len(value))
        searched = _outside_string(content, longest)
        return all(searched.count(spelling) == 1 for (spelling,) in self._spellings.values())

    def check(self, record: dict[str, Any], content: bytes) -> None:
        """Raise MalformedError if an object in ``content``, parsed as ``record``, has one of the keys twice."""
        for name, spellings in self._spellings.items():
            count = sum(map(content.count, spellings))
            # A key in the record that is not found in the content is written with other escapes.
            if count > 1 or (count == 0 and name in record):
                _refuse_repeated(self._spellings, content)
                return


def _outside_string(content: bytes | memoryview, size: int) -> bytes:
    """Return the parts of a JSON value ``content`` in which keys may occur, if it has a string of ``size`` characters.

    The string takes at least as many bytes, so what precedes it and what follows it fit into the others.
    """
    others = len(content) - size
    if 2 * others >= len(content):
        return bytes(content)
    # No key contains a line feed, so none is found where the parts are joined.
    return b"\n".join((content[:others], content[size:]))


def parse_json(content: bytes | memoryview, keys: WantedKeys, whole: bool = True) -> Any:
    """Parse a JSON value. Raise MalformedError if it is invalid, or an object with one of ``keys`` twice.

    ``whole``: ``content`` is a whole line, so that messages can name places in it.
    """
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        content = bytes(content)
        if "infinity" in error.msg:
            return _parse_exactly(content, keys)
        place = f" at character {error.pos + 1} of the line" if whole else ""
        if error.doc.startswith(_NO_NUMBERS, error.pos):
            raise MalformedError(f"NaN or Infinity{place}, which JSON does not have: write null") from None
        raise_bad_json(content, error, place)
    if not keys.are_plain(value, content) and type(value) is dict:
        content = bytes(content)
        keys.check(value, content)
        if _holds_large_number(keys.values(value)):
            return _parse_exactly(content, keys)
    return value


def _holds_large_number(values: Iterable[Any]) -> bool:
    """Return whether a float may be an integer beyond 64 bits, which orjson rounds to a float."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind is float:
            if abs(value) >= _LARGE:
                return True
        elif kind is dict:
            waiting.extend(value.values())
        elif kind is list:
            waiting.extend(value)
    return False


def _parse_exactly(content: bytes, keys: WantedKeys) -> Any:
    """Parse a JSON value with exact integers of any size; several times slower than orjson."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise MalformedError("nested too deeply to read an integer beyond 64 bits") from None
    except ValueError as error:
        # Not JSON, or an integer of more digits than Python converts (4,300).
        reason = "an integer of too many digits" if "limit" in str(error) else f"not valid JSON: {error}"
        raise MalformedError(reason) from None
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise MalformedError("not valid JSON: a number beyond the range of floating point")
        if isinstance(item, (dict, list)):
            waiting.extend(item.values() if isinstance(item, dict) else item)
    if type(value) is dict:
        keys.check(value, content)
    return value


def raise_bad_json(content: bytes, error: orjson.JSONDecodeError, place: str, offset: int = 0) -> NoReturn:
    """Explain why ``content``, ``offset`` bytes into its line, is not JSON."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as wrong:
        raise invalid_utf8(content, wrong, offset) from None
    if "surrogate" in error.msg:
        raise MalformedError(f"an escaped lone surrogate, half a character, which is not text{place}") from None
    raise MalformedError(f"not valid JSON: {error.msg}{place}") from None


def invalid_utf8(content: bytes, error: UnicodeDecodeError, offset: int = 0) -> MalformedError:
    """Return an error with the first byte of ``content``, ``offset`` bytes into its line, that is not UTF-8."""
    line_start = content.rfind(b"\n", 0, error.start) + 1
    place = error.start + 1 - (line_start or -offset)
    return MalformedError(
        f"not valid UTF-8: byte 0x{content[error.start]:02x} at byte {place:,} of the line", "invalid UTF-8"
    )


def _refuse_repeated(names: Iterable[str], content: bytes) -> None:
    wanted = frozenset(names)

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in wanted and name in seen:
                raise MalformedError(f"the key {name!r} twice in one object")
            seen.add(name)

    try:
        json.loads(content, object_pairs_hook=check)
    except RecursionError:
        raise MalformedError("nested too deeply to check for duplicate keys") from None
