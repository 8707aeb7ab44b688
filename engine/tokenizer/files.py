"""Find the tokenizer of a folder, and read its files.

This module does not interpret the tokenizer; ``backends.py`` and ``tiktoken_reference.py`` do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files.regular import read_regular

TokenizerKind = Literal["tokenizer.json", "sentencepiece", "tiktoken"]

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
TIKTOKEN_SUFFIX = ".tiktoken"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that may name the EOS token, in the order of the search."""
MODEL_CONFIG = "config.json"
ADDED_TOKENS_FILE = "added_tokens.json"


def tokenizer_file_name(names: Collection[str]) -> str | None:
    """Return which file of a folder is its tokenizer; the hash of this file identifies the tokenizer of a dataset.

    ``tokenizer.json``; without one ``tokenizer.model``; without both the ``*.tiktoken``, if there is exactly one.

    Args:
        names: file names of the folder, or of the files read from it.
    """
    for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE):
        if name in names:
            return name
    ranks = [name for name in names if name.endswith(TIKTOKEN_SUFFIX)]
    return ranks[0] if len(ranks) == 1 else None


def tokenizer_sha256(content: bytes, description: bytes | None = None) -> str:
    """Return the SHA-256 that identifies a tokenizer, in hexadecimal.

    Args:
        content: of the file that :func:`tokenizer_file_name` names.
        description: of the JSON file next to a .tiktoken, which its ids depend on; hashed after ``content``.
    """
    return hashlib.sha256(content if description is None else content + description).hexdigest()


def tokenizer_kind(file: Path) -> TokenizerKind:
    """Return the kind of the tokenizer ``file`` by its suffix: ``.model``, ``.tiktoken``, everything else a
    tokenizer.json.
    """
    by_suffix: dict[str, TokenizerKind] = {".model": "sentencepiece", TIKTOKEN_SUFFIX: "tiktoken"}
    return by_suffix.get(file.suffix, "tokenizer.json")


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; empty if the file is absent.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        config = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def token_text(token: Any) -> str | None:
    """Return the text of a token in a configuration, given as a string or as an object; None if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def find_local_tokenizer(name: str) -> Path | None:
    """Return the tokenizer file of a folder or file ``name``; None if there is no such path.

    Raises:
        UserError: the folder holds no tokenizer, or several.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _find_in_folder(name, path)
    return path if path.exists() else None  # its reader refuses anything but a regular file


def _find_in_folder(name: str, folder: Path) -> Path:
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    file = tokenizer_file_name(names)
    if file is not None:
        return folder / file
    ranks = sorted(name for name in names if name.endswith(TIKTOKEN_SUFFIX))
    if ranks:
        raise UserError(f"{name}: holds {' and '.join(ranks)}; name one of these files with --tokenizer")
    if {"vocab.json", "merges.txt"} <= set(names):
        raise UserError(
            f"{name}: holds vocab.json and merges.txt, which do not define how text is split, and no {TOKENIZER_FILE}; "
            "make one with transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder) if the model's "
            "config.json is in the folder, else with the class instead of AutoTokenizer, such as Qwen2Tokenizer; or "
            "name another tokenizer with --tokenizer"
        )
    raise UserError(
        f"{name}: no {TOKENIZER_FILE} in this folder; save the tokenizer in the fast format (transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)) or name another with --tokenizer (the folder "
        f"also has no {SENTENCEPIECE_FILE} of sentencepiece and no *{TIKTOKEN_SUFFIX})"
    )
