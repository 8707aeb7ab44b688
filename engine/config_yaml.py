"""YAML without its traps: what people write is what is read, and what is written reads back unchanged.

YAML 1.1 keeps the last of duplicate keys, takes ``1e-5`` for text, ``12:30:00`` for a number and ``no`` for false.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """YAML without the 1.1 traps: duplicate keys are an error, ``1e-5`` is a float, ``12:30`` and ``no`` are text."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise UserError(f"line {key_node.start_mark.line + 1}: {key} cannot be a key; a key is a word")
            if key in seen:
                raise UserError(f"duplicate key '{key}' in line {key_node.start_mark.line + 1}: keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes text that would be no text to a YAML 1.1 reader or to ours (``1e-5``)."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


def load_yaml(text: str) -> Any:
    """Parse YAML text strictly; raises :class:`UserError` for duplicate keys and ``yaml.YAMLError`` for bad syntax."""
    return yaml.load(text, Loader=_StrictLoader)


def dump_yaml(content: Any) -> str:
    """YAML text that :func:`load_yaml` reads back unchanged, keys in their order."""
    return yaml.dump(content, Dumper=_StrictDumper, sort_keys=False)
