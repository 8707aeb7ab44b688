"""Read a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.regular import read_regular
from .config_reader import shown

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_REMEDY = (
    f"{ADAPTER_FILE} says that this is a PEFT adapter, not a model; merge it first: "
    "PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(other)"
)
INLINE = "model.architecture"
"""Name in errors for a config inside the run's configuration."""
_MOST_BYTES = 16 << 20
"""Limit of a config.json in bytes: published ones have a few kB."""
_DEEPEST = 50
"""Limit of nested objects and lists in a config. Writing one uses more of Python's stack than reading it."""
_TOO_DEEP = f"nested more than {_DEEPEST} levels deep; a Hugging Face config.json is needed"


def read_hf_config(source: dict[str, Any] | str | Path) -> dict[str, Any]:
    """Return the raw ``config.json`` of a dictionary, a file, or a folder that holds one.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    if isinstance(source, dict):
        if _is_deeper(source, _DEEPEST):
            raise UserError(f"{INLINE}: {_TOO_DEEP}")
        return source
    path = Path(source)
    try:
        if path.is_dir():
            path = path / CONFIG_FILE
        data = read_regular(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {_missing_config_remedy(path)}") from None
    return hf_config_of(data, path)


def hf_config_of(data: bytes, path: Path) -> dict[str, Any]:
    """Return the object in ``data``, the content of the ``config.json`` at ``path``.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=lambda pairs: _object(pairs, path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; fetch it again") from None
    except RecursionError:
        raise UserError(f"{path}: {_TOO_DEEP}") from None
    if _is_deeper(content, _DEEPEST):
        raise UserError(f"{path}: {_TOO_DEEP}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _missing_config_remedy(path: Path) -> str:
    if path.name == CONFIG_FILE and os.path.isdir(path.parent):
        if os.path.exists(path.parent / ADAPTER_FILE):
            return ADAPTER_REMEDY
        if os.path.exists(path.parent / "params.json"):
            return "params.json has the publisher's own layout; get the model as saved by transformers"
    return "a Hugging Face config.json is needed"


def _object(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """Return a JSON object, in which a key may be repeated only with the same value."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content and content[key] != value:
            raise UserError(f"{path}: {shown(key)} occurs twice with different values; remove one of them")
        content[key] = value
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    """Return whether JSON ``content`` has objects or lists nested more than ``levels`` deep."""
    level = [content]
    for _ in range(levels + 1):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for children in nested for child in children]
    return bool(level)
