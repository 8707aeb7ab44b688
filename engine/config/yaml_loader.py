"""Read and write YAML without its surprising conversions; written values are read back unchanged.

YAML 1.1 keeps the last of duplicate keys, reads ``1e-5`` as text, ``12:30:00`` as a number and ``no`` as false. This
reader refuses duplicates, reads the first as a number and the others as text. A key is always the text as written
(``2024:``, ``on:``). Anchors, aliases and merge keys (``<<``) work as in YAML 1.1.

The input is bounded: size, depth, length of numbers, and the number of values after aliases are expanded. Tags other
than those of plain values are refused by name. Not supported: several documents in one text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from ..errors import UserError

MOST_CHARACTERS = 2**20
"""Limit for one text. A configuration with 5,000 data sources and all keys written out has about half as many."""
_MOST_VALUES = 100_000
"""Limit of values and keys, with every alias counted at its expanded size."""
_DEEPEST = 50
"""Limit of nested lists and mappings."""
_MOST_DIGITS = 100
"""Limit of an integer's digits: far above any setting, far below what takes long to convert."""
_MERGE = "<<"
_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
"""Patterns of plain values by tag, and the characters that they begin with."""
_COMPILED = {tag: re.compile(rf"^(?:{pattern})$") for tag, (pattern, _) in _PATTERNS.items()}
_KNOWN_TAGS = {_TAG + name for name in ("str", "map", "seq", *_PATTERNS)}


class _StrictLoader(yaml.SafeLoader):
    """Reads the values described in this module, and raises :class:`UserError` with the line for all others."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._composed = 0
        self._sizes: dict[int, int] = {}
        """Number of values in each finished list or mapping, by the identity of its node."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.CollectionNode) and id(node) not in self._sizes:
                raise UserError(f"line {line}: *{event.anchor} contains itself; write the value out")
            return node
        if event.tag and event.tag not in (*_KNOWN_TAGS, "!"):
            tag = event.tag.replace(_TAG, "!!")[:60]
            raise UserError(f"line {line}: the tag {tag} is not supported; write a plain value")
        self._depth += 1
        self._composed += 1
        self._require_few(self._composed, line)
        if self._depth > _DEEPEST:
            raise UserError(f"line {line}: more than {_DEEPEST} nested lists or mappings; use fewer levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.CollectionNode):
            children = node.value
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in children for part in pair]
            self._sizes[id(node)] = size = 1 + sum(self._sizes.get(id(child), 1) for child in children)
            self._require_few(size, line)
        return node

    def _require_few(self, values: int, line: int) -> None:
        if values > _MOST_VALUES:
            raise UserError(f"line {line}: more than {_MOST_VALUES:,} values, with aliases written out; write fewer")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"line {node.start_mark.line + 1}: !!map is for 'key: value' lines; remove the tag")
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key in seen:
                raise UserError(f"duplicate key '{key}' in line {key_node.start_mark.line + 1}: keep one of the two")
            seen.add(key)
            if key == _MERGE and key_node.style is None:
                for part in self._merged(value_node):
                    merged = {**part, **merged}  # if several define a key, the first one wins
            else:
                own[key] = self.construct_object(value_node, deep=True)
        return {**merged, **own}

    def _merged(self, node: yaml.Node) -> list[dict]:
        """Return the mappings that ``<<`` names, the most important first."""
        nodes: list[Any] = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for item in nodes:
            if not isinstance(item, yaml.MappingNode):
                raise UserError(
                    f"line {node.start_mark.line + 1}: << merges mappings only; name one as *anchor, or a list of such"
                )
        return [self.construct_mapping(item, deep=True) for item in nodes]

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar with a tag other than text."""
        text, kind = self.construct_scalar(node), node.tag.removeprefix(_TAG)
        line = node.start_mark.line + 1
        if not _COMPILED[kind].match(text):
            raise UserError(
                f"line {line}: {text[:60]!r} cannot be read as !!{kind}; remove the tag or correct the value"
            )
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        number = text.replace("_", "").lower()
        if len(number) > _MOST_DIGITS:
            raise UserError(f"line {line}: a number of {len(number):,} characters; at most {_MOST_DIGITS} are read")
        if kind == "int":
            return int(number)
        value = float(number.replace(".inf", "inf").replace(".nan", "nan"))
        if (math.isinf(value) and "inf" not in number) or (value == 0 and re.search("[1-9]", number.split("e")[0])):
            raise UserError(f"line {line}: {text[:60]} is outside the range of floating-point numbers")
        return value


class _StrictDumper(yaml.SafeDumper):
    """Quotes texts that a YAML 1.1 reader or ours would not read as text (``1e-5``, ``<<``)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _key(node: yaml.Node) -> str:
    """Return the text of a key."""
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
        raise UserError(f"line {line}: a {kind} cannot be a key; a key is a word")
    if not node.value and node.style is None:
        raise UserError(f"line {line}: a value without a key; write key: value")
    return node.value


for _name, (_, _first) in _PATTERNS.items():
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(_TAG + _name, _COMPILED[_name], _first)
    _StrictLoader.add_constructor(_TAG + _name, _StrictLoader.construct_plain)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text. Values of aliases are copies of each other.

    Raises:
        UserError: the text violates the rules or limits of this module; one line with the line number.
        yaml.YAMLError: bad syntax.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{len(text):,} characters of YAML; at most {MOST_CHARACTERS:,} are read")
    return _unshared(yaml.load(text, Loader=_StrictLoader))


def _unshared(value: Any) -> Any:
    """Return a copy in which no list or mapping occurs twice, so that changing one place changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def explain(error: yaml.YAMLError) -> str:
    """Return why :func:`load_yaml` cannot parse a text, in one line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if isinstance(error, yaml.composer.ComposerError) and "single document" in str(error):
        return "several documents; keep one, without --- between them"
    if problem and mark:
        hint = "; indent with spaces" if r"\t" in problem else ""
        if isinstance(error, yaml.composer.ComposerError) and error.context:
            problem = f"{error.context}, {problem}"
        return f"not valid YAML: line {mark.line + 1}, column {mark.column + 1}: {problem}{hint}"
    return f"not valid YAML: {' '.join(str(error).split())[:300]}"


def dump_yaml(content: Any) -> str:
    """Return YAML text that :func:`load_yaml` reads back unchanged, with keys in their order."""
    return yaml.dump(content, Dumper=_StrictDumper, sort_keys=False)
