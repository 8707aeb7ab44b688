"""Read a model's configuration with types, and errors that name the file, the key and the value."""

from __future__ import annotations

import reprlib
import sys
from typing import Any, NoReturn

from ..errors import UserError

_SHORT = reprlib.Repr()
"""Shortens values of an untrusted file, so that the message fits in one line."""
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


class NotNative(UserError):
    """A config is sound, but the native decoder does not implement it; another implementation may."""


class ConfigReader:
    """Reads the keys of one JSON object.

    Args:
        config: the object.
        where: names it in errors, such as ``models/llama/config.json``.
    """

    def __init__(self, config: dict[str, Any], where: str):
        self.config = config
        self.where = where

    def fail(self, key: str, value: Any, remedy: str) -> NoReturn:
        """Refuse the ``value`` of ``key``."""
        raise UserError(f"{self.where}: {shown(key)} is {_SHORT.repr(value)}; {remedy}")

    def not_native(self, key: str, value: Any, remedy: str) -> NoReturn:
        """Refuse the ``value`` of ``key``, which the native decoder does not implement."""
        raise NotNative(f"{self.where}: {shown(key)} is {_SHORT.repr(value)}; {remedy}")

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the names in ``allowed``, which are those that the native decoder implements."""
        value = self.config.get(key, default)
        # Not every value is hashable: the file may have a list or an object here.
        if not isinstance(value, str):
            self.fail(key, value, f"supported: {', '.join(allowed)}")
        if value not in allowed:
            self.not_native(key, value, f"supported: {', '.join(allowed)}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number of at least ``least``, which is 0 or 1. null means the default."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.fail(key, value, "a positive integer is needed" if least else "an integer of at least 0 is needed")
        return value

    def size(self, key: str, most: int, default: int | None = None) -> int:
        """Return a positive integer of at most ``most``."""
        value = self.integer(key, default)
        if value > most:
            self.fail(key, value, f"at most {most:,} is supported")
        return value

    def number(self, key: str, default: float | None = None, or_zero: bool = False) -> float:
        """Return a finite positive number; with ``or_zero`` also 0. null means the default."""
        value = self.config.get(key)
        value = default if value is None else value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and is_number and (0 < value <= sys.float_info.max or (or_zero and value == 0)):
            return float(value)
        self.fail(key, value, "a number of at least 0 is needed" if or_zero else "a positive number is needed")

    def flag(self, key: str) -> bool:
        """Return true or false; null and a missing key mean false."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, value, "true or false is needed")
        return bool(value)

    def refuse_unless(self, key: str, expected: float) -> None:
        """Refuse a number that would change the computation; null and a missing key mean ``expected``."""
        value = self.config.get(key)
        if value is not None and (isinstance(value, bool) or value != expected):
            self.fail(key, value, f"only {expected!r} is implemented")


def shown(text: Any) -> str:
    """Shorten a key of an untrusted file to one line for a message."""
    written = str(text)
    return written if len(written) <= 80 and written.isprintable() else _SHORT.repr(written)
