"""Find and read the files of ``--config``: by path, by the name of a shipped configuration, or by URL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files.paths import expand_path, is_url
from ..files.regular import IrregularFile, read_regular
from .remote_file import download, without_query
from .yaml_loader import MOST_CHARACTERS, explain, load_yaml

SHIPPED = Path(__file__).resolve().parents[2] / "megatron_configs"
"""Configurations that come with the code."""
_MOST_BYTES = 4 * MOST_CHARACTERS


def find_config(name: str) -> Path | str:
    """Return the file that ``--config name`` selects: a path, or the name of a shipped configuration. A URL is returned
    as text.

    Raises:
        UserError: the file does not exist; if a name was given, the message lists the shipped configurations.
    """
    if is_url(name):
        return name
    path = Path(expand_path(name, "--config"))
    if os.path.lexists(path) and not path.is_dir():
        return path
    if path.parent in (Path(), Path(SHIPPED.name)):
        for shipped in (SHIPPED / path.name, SHIPPED / f"{path.name}.yaml"):
            if shipped.is_file():
                return shipped
    elif not path.is_dir():
        raise UserError(f"--config {name}: No such file or directory")
    if path.is_dir():
        raise UserError(f"--config {name}: Is a directory; name a YAML file in it")
    available = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise UserError(
        f"--config {name}: No such file or directory, and no configuration of that name in {SHIPPED}, which has "
        f"{available}"
    )


def read_config(path: Path | str) -> dict[str, Any]:
    """Return the content of a configuration file as plain, unchecked values.

    Args:
        path: of the file, or its URL as text.

    Raises:
        UserError: the file cannot be read, or does not hold ``key: value`` lines. The message begins with the path.
    """
    text = _read_text(path)
    path = path if isinstance(path, Path) else without_query(path)
    try:
        content = load_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {explain(error)}") from None
    if not isinstance(content, dict):
        shown = "nothing" if content is None else repr(content)[:60]
        raise UserError(f"{path}: expected 'key: value' lines, found {shown}")
    return content


def _read_text(path: Path | str) -> str:
    data = _read_bytes(path) if isinstance(path, Path) else download(path, "--config", _MOST_BYTES)
    shown = path if isinstance(path, Path) else without_query(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        other = " but UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(f"--config {shown}: not a UTF-8 text file{other}; save it as UTF-8") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path, _MOST_BYTES)
    except IrregularFile as error:
        raise UserError(f"--config {path}: {error.strerror}; write the configuration to a file") from None
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
