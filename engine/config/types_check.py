"""Check plain values against declared types, and build the settings objects from correct ones.

The types are those of the dataclasses in :mod:`~.settings`: bool, int, float, str, None, ``Literal``, unions, lists,
dictionaries, dataclasses, and the marks :data:`FilePath` and :class:`Switch`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..files.paths import expand_path
from .settings import PATH_MARK, URL_MARK, Switch
from .spelling import did_you_mean

UNUSABLE: Any = object()
"""Placeholder for a value of the wrong type."""


class Problems:
    """All problems of a configuration, collected to be reported together."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._keys: list[str] = []
        """Keys whose values cannot be used."""

    def add(self, message: str, key: str = "") -> None:
        """Add a problem of ``key``, one line."""
        if message not in self.messages:
            self.messages.append(message)
        if key:
            self.add_key(key)

    def add_key(self, key: str) -> None:
        """Note that the value of ``key`` cannot be used, for a reason that is reported elsewhere."""
        self._keys.append(key)

    def add_consequences(self, messages: Iterator[str]) -> None:
        """Add problems found with the usable values, unless they mention a key that already has a problem."""
        names = {*self._keys, *(leaf for key in self._keys if "_" in (leaf := key.rpartition(".")[2]))}
        mentions = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?![\w])" for name in names) or "(?!)")
        for message in messages:
            if not mentions.search(message):
                self.add(message)

    def raise_if_any(self) -> None:
        """Raise one :class:`UserError` that lists all problems."""
        if self.messages:
            raise UserError(*self.messages)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, marks included."""
    return get_type_hints(kind, include_extras=True)


def bare(hint: Any) -> Any:
    """Return ``hint`` without its marks."""
    return bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def is_section(hint: Any) -> bool:
    """Return whether ``hint`` is a dataclass: its keys are known, and files and options are merged in it."""
    return dataclasses.is_dataclass(bare(hint))


def is_dictionary(hint: Any) -> bool:
    """Return whether a value of this type may hold user-defined entries."""
    return accepts({}, hint) and not is_section(member_of_union({}, hint))


def item_hint(hint: Any) -> Any:
    """Return the type of the items of a list or dictionary of type ``hint``."""
    hint = bare(hint)
    return get_args(hint)[-1] if get_origin(hint) in (list, dict) else Any


def member_of_union(value: Any, hint: Any) -> Any:
    """Return the list or dataclass among the types of the union ``hint`` that takes ``value``, a list or dictionary, or
    the path if it is text; otherwise ``hint`` itself.
    """
    members = get_args(bare(hint)) if get_origin(bare(hint)) in (Union, UnionType) else ()
    for member in members:
        is_list = isinstance(value, list) and get_origin(bare(member)) is list
        if is_list or (isinstance(value, dict) and is_section(member)) or (isinstance(value, str) and is_path(member)):
            return member
    return hint


def accepts(value: Any, hint: Any) -> bool:
    """Return whether ``value`` has the type ``hint``, checked at the outermost level only."""
    if (switch := switch_of(hint)) and _switched(value, switch) in (switch.true, switch.false):
        return True
    hint = bare(hint)
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(accepts(value, member) for member in get_args(hint))
    if kind is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def check(value: Any, hint: Any, name: str, found: Problems, where: str = "") -> Any:
    """Return the plain ``value`` without the parts that do not have the type ``hint``.

    Args:
        value: value of the key ``name``.
        hint: its declared type.
        name: dotted, as in ``data.train[0].path``; empty for the whole configuration.
        found: receives the problems.
        where: beginning of each message, such as the name of a file.

    Returns:
        The usable part of the value, or :data:`UNUSABLE`.
    """
    hint = member_of_union(value, hint)
    kind = bare(hint)
    if isinstance(value, dict) and is_section(hint):
        hints, kept = hints_of(kind), {}
        for key, item in value.items():
            full = f"{name}.{key}" if name else str(key)
            if key in hints:
                kept[key] = check(item, hints[key], full, found, where)
            else:
                found.add(f"{where}unknown key '{full}'{did_you_mean(full, section=isinstance(item, dict))}", full)
        if name.endswith("]"):
            for missing in sorted(required(kind) - value.keys()):
                listing = name.rpartition("[")[0]
                found.add(f"{where}{name}.{missing} is missing; every item of {listing} needs it", f"{name}.{missing}")
        return {key: item for key, item in kept.items() if item is not UNUSABLE}
    if isinstance(value, list) and get_origin(kind) is list:
        items = [check(item, item_hint(hint), f"{name}[{place}]", found, where) for place, item in enumerate(value)]
        if any(item is UNUSABLE for item in items):
            found.add_key(name)
        return [item for item in items if item is not UNUSABLE]
    if isinstance(value, dict) and get_origin(kind) is dict:
        entries = {key: check(item, item_hint(hint), f"{name}.{key}", found, where) for key, item in value.items()}
        return {key: item for key, item in entries.items() if item is not UNUSABLE}
    if not accepts(value, hint):
        whole = isinstance(value, float) and value.is_integer() and accepts(int(value), hint)
        remedy = f"a whole number is needed: write {int(value):_}" if whole else f"expected {type_in_words(hint)}"
        found.add(f"{where}{name} is {show(value)}; {remedy}", name)
        return UNUSABLE
    for inner in _not_finite(value, name) if is_dictionary(hint) else ():
        found.add(f"{where}{inner} is not a finite number; write another value", name)
    return value


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """Yield the names of entries in a free dictionary whose numbers JSON cannot express."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name


def build(value: Any, hint: Any, name: str, found: Problems, missing: list[str]) -> Any:
    """Return the settings object of the checked plain ``value``.

    Args:
        value: value of the key ``name``; see :func:`check`.
        hint: its declared type.
        name: dotted.
        found: receives the paths that cannot be expanded.
        missing: receives the names of missing required keys. Placeholders replace them, so that the rest can be
            checked.
    """
    hint = member_of_union(value, hint)
    kind = bare(hint)
    if isinstance(value, dict) and is_section(hint):
        values = {}
        for key, item_type in hints_of(kind).items():
            full = f"{name}.{key}" if name else key
            if key in value:
                values[key] = build(value[key], item_type, full, found, missing)
            elif key in required(kind):
                values[key] = _placeholder(item_type, full, found, missing)
        return kind(**values)
    if isinstance(value, list) and get_origin(kind) is list:
        return [build(item, item_hint(hint), f"{name}[{i}]", found, missing) for i, item in enumerate(value)]
    if isinstance(value, dict) and get_origin(kind) is dict:
        return {key: build(item, item_hint(hint), f"{name}.{key}", found, missing) for key, item in value.items()}
    if switch := switch_of(hint):
        value = _switched(value, switch)
    if isinstance(value, str) and is_path(hint):
        try:
            return expand_path(value, name, urls=_may_be_url(hint))
        except UserError as error:
            found.add(str(error), name)
            return value
    return float(value) if accepts(1.5, hint) and not is_dictionary(hint) and type(value) is int else value


def _placeholder(hint: Any, name: str, found: Problems, missing: list[str]) -> Any:
    if is_section(hint):
        return build({}, hint, name, found, missing)
    if "[" not in name:  # a key that a list item lacks has already been reported
        missing.append(name)
    found.add_key(name)
    return {int: 1, list: []}.get(get_origin(bare(hint)) or bare(hint), name)


def required(kind: Any) -> set[str]:
    """Return the fields of a dataclass that have no default."""
    return {
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }


def is_path(hint: Any) -> bool:
    """Return whether text of this type is a path, or may be one."""
    if get_origin(hint) is Annotated:
        return PATH_MARK in hint.__metadata__
    return get_origin(hint) in (Union, UnionType) and any(is_path(member) for member in get_args(hint))


def _may_be_url(hint: Any) -> bool:
    return get_origin(hint) is Annotated and URL_MARK in hint.__metadata__


def switch_of(hint: Any) -> Switch | None:
    """Return the :class:`Switch` that annotates ``hint``; None without one."""
    marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, Switch)), None)


def _switched(value: Any, switch: Switch) -> Any:
    """Return the value that a word for yes or no selects by ``switch`` (case is ignored), or ``value`` itself."""
    word = str(value).lower() if isinstance(value, bool | str) else value
    if word in ("true", "yes", "on", switch.true):
        return switch.true
    return switch.false if word in ("false", "no", "off", switch.false) else value


def type_in_words(hint: Any) -> str:
    """Return the type ``hint`` in words."""
    hint = bare(hint)
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(type_in_words(member) for member in get_args(hint))
    if kind is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    words = {bool: "true or false", str: "text", NoneType: "null", list: "a list"}
    return words.get(kind, kind.__name__ if kind in (int, float) else "'key: value' lines")


def show(value: Any) -> str:
    """Return ``value`` as YAML writes it, shortened."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
