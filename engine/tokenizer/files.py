"""Find the tokenizer file of a name: in a folder, as a file, or on the Hugging Face Hub.

This module does not interpret the files; ``backends.py`` and ``tiktoken_reference.py`` do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from contextlib import suppress
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
_BESIDE = (*CONFIG_FILES, "chat_template.jinja", MODEL_CONFIG)
"""Files to download from the Hub together with the tokenizer."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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


def find_tokenizer_file(name: str) -> Path:
    """Return the tokenizer file of ``name``: a folder, a file, or a Hub name (its ``tokenizer.json``).

    A Hub name is looked up in the local cache first: a cached tokenizer needs no network and does not change.

    Raises:
        UserError: nothing is found there, or it is not in the cache and the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _find_in_folder(name, path)
    if path.exists():  # its reader refuses anything but a regular file
        return path
    if not _HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name}: no such tokenizer folder or file; give an existing one, or a Hub name, with --tokenizer"
        )
    return _find_on_hub(name)


def companions(file: Path) -> list[Path]:
    """Return the existing files next to a tokenizer's file that may be read with it."""
    names = (*_BESIDE, ADDED_TOKENS_FILE, "vocab.json", "merges.txt", TOKENIZER_FILE)
    paths = [file.with_name(name) for name in (*names, SENTENCEPIECE_FILE, f"{file.stem}.json")]
    return [path for path in dict.fromkeys(paths) if path != file and path.is_file()]


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


def _find_on_hub(name: str) -> Path:
    """Return the path of ``tokenizer.json`` of the Hub repository ``name``, downloaded if it is not in the cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    remedy = "name a folder that holds tokenizer.json, or another Hub name, with --tokenizer"
    try:
        cached = try_to_load_from_cache(name, TOKENIZER_FILE)
        if isinstance(cached, str):
            return Path(cached)
        _require_hub(name)
        file = Path(hf_hub_download(name, TOKENIZER_FILE))
        for beside in _BESIDE:
            with suppress(EntryNotFoundError):
                hf_hub_download(name, beside)
        return file
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{name}: the Hub requires you to accept a licence (`hf auth login`), or {remedy}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder, and no such repository on the Hub; {remedy}") from None
    except LocalEntryNotFoundError:
        raise UserError(_unreachable(name)) from None
    except EntryNotFoundError:
        raise UserError(f"{name}: this Hub repository has no {TOKENIZER_FILE}; {remedy}") from None
    except Exception as error:  # HTTP errors, whose types differ between versions of the Hub client
        raise UserError(f"{name}: the Hub gave no tokenizer: {error}; {remedy}") from error


def _require_hub(name: str) -> None:
    """Fail at once if the Hub cannot be reached: a download would retry for half a minute first."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # HTTP errors, whose types differ between versions of the Hub client
        raise UserError(_unreachable(name)) from None


def _unreachable(name: str) -> str:
    return (
        f"tokenizer {name}: no folder of that name, not in the Hugging Face cache, and the Hub cannot be reached; pass "
        "--tokenizer with a folder that holds tokenizer.json, or connect once to fill the cache"
    )
