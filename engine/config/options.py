"""Merge the settings of files and options, in their order, into one plain dictionary.

A later file or option wins. Sections are merged key by key. Lists, and dictionaries with user-defined entries
(``model.architecture``, ``data.validation``), are replaced as a whole by a file or option that sets them. An option
that names a place changes only that: ``--data.train.0.weight 2``, ``--model.architecture.rope_scaling.factor 32.0``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files.paths import expand_path
from .budget import KINDS, Kind
from .files import find_config, read_config
from .settings import RunConfig
from .spelling import did_you_mean, nearest
from .types_check import (
    UNUSABLE,
    Problems,
    accepts,
    bare,
    check,
    hints_of,
    is_dictionary,
    is_section,
    item_hint,
    member_of_union,
    show,
)
from .yaml_loader import explain, load_yaml

_NULL = ("null", "Null", "NULL")
_INDEXED = re.compile(r"(\w+)((?:\[\d+\])+)", re.ASCII)
_ARCHITECTURE = "model.architecture"


class Settings:
    """The merged settings so far, and the problems in them."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.found = Problems()
        self.unreadable = False
        """True if a file could not be read, so that many keys will be missing."""
        self.notes: list[str] = []
        """Remarks that are not errors."""
        self._places: dict[str, list[str]] = {}
        """Options that changed one place in a list or dictionary, by the key of that list or dictionary."""
        self._budget_layers: dict[Kind, str] = {}
        """The file, or the options, that set each kind of budget last."""
        self._entries_of_nothing: dict[str, str] = {}
        """Options that set an entry of a dictionary which was null or absent, by the dictionary's key."""

    def add_file(self, name: str) -> None:
        """Merge the file that ``--config name`` selects; an unreadable one is added as a problem."""
        try:
            path = find_config(name)
            if isinstance(path, Path) and path != Path(expand_path(name, "--config")):
                self.notes.append(f"--config {name} is {path}")
            content = read_config(path)
        except UserError as error:
            self.found.add(str(error))
            self.unreadable = True
            return
        content = check(content, RunConfig, "", self.found, f"{path}: ")
        self._note_replaced(content, f"--config {name}")
        self._replace_budgets(content, f"--config {name}")
        _merge(self.tree, content, RunConfig)

    def add_option(self, option: str, text: str) -> None:
        """Set the key of ``--option text``, or one place in it; ``--data.train+`` appends to the list."""
        key = option.removesuffix("+")
        try:
            holder, last, hint, name = self._place(key)
            listing = ".".join(name.split("[")[0].split(".")[:2])
            if name != listing or option != key:
                self._places.setdefault(listing, []).append(option)
            if option != key:
                self._append(holder, last, hint, name, text)
                return
            value = check(_typed(text, hint, key), hint, name, self.found)
            if value is UNUSABLE:
                return
            self._note_replaced(_nested(name, value), f"--{key}")
            self._replace_budgets(_nested(name, value), "options")
            if is_section(hint) and isinstance(holder, dict):
                _merge(holder.setdefault(last, {}), value, bare(hint))
            else:
                holder[last] = value
        except UserError as error:
            self.found.add(str(error), key)

    def check_entries(self) -> None:
        """Refuse options that set entries of ``model.architecture`` if the architecture is that of
        ``model.initialize_from``.
        """
        model = self.tree.get("model", {})
        source, option = model.get("initialize_from"), self._entries_of_nothing.get(_ARCHITECTURE)
        if source is not None and option is not None and isinstance(model.get("architecture"), dict):
            self.found.add(
                f"--{option} sets one entry of {_ARCHITECTURE}, which is null: the architecture comes from "
                f"model.initialize_from {source} and cannot be changed here; remove the option, or give the whole "
                f"{_ARCHITECTURE}",
                _ARCHITECTURE,
            )

    def _note_replaced(self, content: dict[str, Any], by: str) -> None:
        """Note earlier options whose effect is lost, because ``content`` sets the whole list or dictionary."""
        for listing in list(self._places):
            section, _, leaf = listing.rpartition(".")
            if leaf in (content.get(section, {}) if section else content):
                for option in self._places.pop(listing):
                    self.notes.append(f"--{option} has no effect: {by}, which comes later, sets the whole {listing}")

    def _replace_budgets(self, content: dict[str, Any], layer: str) -> None:
        """Remove the budgets (``train_tokens``, ``train_steps``, ...) of earlier files which ``content`` replaces.

        Args:
            content: of a file or option.
            layer: where it is from. Two budgets of one file, or of the options, are refused later.
        """
        for kind in KINDS:
            given = [key for key in kind.keys if (content.get(kind.section) or {}).get(key) is not None]
            if given and self._budget_layers.get(kind) != layer:
                self._budget_layers[kind] = layer
                for key in kind.keys:
                    self.tree.get(kind.section, {}).pop(key, None)

    def _append(self, holder: Any, last: Any, hint: Any, name: str, text: str) -> None:
        listing = holder.get(last) if isinstance(holder, dict) else holder[last]
        if listing is None and accepts([], hint):
            listing = []
        if not isinstance(listing, list):
            raise UserError(f"--{name}+ appends to a list, but {name} is {show(listing)}; write --{name} VALUE")
        content = _typed(text, list, f"{name}+")
        items = content if isinstance(content, list) else [content]
        for place, item in enumerate(items, len(listing)):
            value = check(item, item_hint(hint), f"{name}[{place}]", self.found)
            listing += [value] if value is not UNUSABLE else []
        holder[last] = listing

    def _place(self, key: str) -> tuple[Any, Any, Any, str]:
        """Return (list or dictionary, index or key in it, type of the value there, its name) of the dotted ``key``.

        Creates missing sections on the way.

        Raises:
            UserError: there is no such place.
        """
        node: Any = self.tree
        hint: Any = RunConfig
        name, rest = "", key
        while True:
            last, hint, name, rest = self._step(node, hint, name, rest, key)
            if not rest:
                return node, last, hint, name
            child = node.get(last) if isinstance(node, dict) else node[last]
            inner = self._opened(child, hint, name, key)
            if inner is not child and not (isinstance(inner, list) and child is None):
                node[last] = inner
            node = inner

    def _step(self, node: Any, hint: Any, name: str, rest: str, key: str) -> tuple[Any, Any, str, str]:
        """Return (index or key in ``node``, type of the value there, its name, the rest of the dotted ``rest``)."""
        if isinstance(node, list):
            part, _, rest = rest.partition(".")
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                items = "1 item" if len(node) == 1 else f"{len(node)} items"
                raise UserError(
                    f"--{key}: {part!r} is not the number of an item: {name} has {items}, counted from 0; append "
                    f"another with --{name}+"
                )
            return int(part), item_hint(hint), f"{name}[{int(part)}]", rest
        if is_section(hint):
            hints = hints_of(bare(hint))
            part, dot, rest = rest.partition(".")
            part, rest = _without_brackets(part, rest)
            if part not in hints or (dot and not rest):
                full = f"{name}.{part}" if name else part
                raise UserError(f"unknown option --{key}{did_you_mean(full if '[' in full else key)}")
            return part, hints[part], f"{name}.{part}" if name else part, rest
        part, rest = _entry(node, rest) if item_hint(hint) is Any else (rest, "")
        if part not in node and (near := nearest(part, node)):
            self.notes.append(f"--{key} adds the entry {part!r} to {name}, which has {near!r}")
        return part, item_hint(hint), f"{name}.{part}", rest

    def _opened(self, child: Any, hint: Any, name: str, key: str) -> Any:
        """Return ``child``, the value of ``name``, as a list or dictionary in which a place can be set."""
        if isinstance(child, (dict, list)):
            return child
        if is_section(hint):
            return {}
        if child is None and accepts([], hint) and not is_dictionary(hint):
            return []
        if is_dictionary(hint) and hint is not Any:
            if child is None:
                self._entries_of_nothing.setdefault(name, key)
                return {}
            # Imported here, because the parser is also used without a model.
            from ..model.config_file import read_hf_config
            from ..model.implementations import unread_keys

            content = read_hf_config(expand_path(child, name))
            unread = unread_keys(
                content, str(child)
            )  # published files may have such keys, a run's configuration may not
            without = f", without its unused keys: {', '.join(unread)}" if unread else ""
            self.notes.append(f"--{key} changes one entry of what {child} holds{without}")
            return {entry: value for entry, value in content.items() if entry not in unread}
        if hint is not Any:
            raise UserError(f"unknown option --{key}{did_you_mean(key)}")
        if child is None:
            return {}
        raise UserError(f"--{key}: {name} is {show(child)}, which has no entries; set --{name} itself")


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Return ``value`` of the section or key ``name`` as a file would set it; an empty dictionary for a place in a
    list.
    """
    section, _, leaf = name.rpartition(".")
    if "." in section or "[" in name:
        return {}
    return {section: {leaf: value}} if section else {leaf: value}


def _without_brackets(part: str, rest: str) -> tuple[str, str]:
    """Split ``train[0]``, as errors write it, into ``train`` and ``0``, as options write it."""
    if not (match := _INDEXED.fullmatch(part)):
        return part, rest
    indices = ".".join(re.findall(r"\d+", match[2]))
    return match[1], f"{indices}.{rest}" if rest else indices


def _entry(node: dict, dotted: str) -> tuple[str, str]:
    """Return the key of ``node`` that ``dotted`` begins with, and the remainder. Existing keys may contain dots."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        if (key := ".".join(parts[:count])) in node:
            return key, ".".join(parts[count:])
    return _without_brackets(parts[0], ".".join(parts[1:]))


def _typed(text: str, hint: Any, key: str) -> Any:
    """Return the value of an option: the text itself for text settings, else the value that a file would have.

    Raises:
        UserError: the text is not valid YAML.
    """
    is_entry = text.lstrip().startswith("{") and is_section(member_of_union({}, hint))
    if accepts(text, hint) and not is_dictionary(hint) and not is_entry:
        return None if text in _NULL or (text in ("", "~") and accepts(None, hint)) else text
    try:
        return load_yaml(text)
    except UserError as error:
        raise UserError(f"--{key}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--{key} {text[:60]}: {explain(error)}") from None


def _merge(tree: dict[str, Any], content: dict[str, Any], kind: Any) -> None:
    """Set the values of ``content`` in ``tree``, key by key in sections."""
    for key, value in content.items():
        hint = hints_of(kind)[key]
        if is_section(hint) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, bare(hint))
        else:
            tree[key] = value
