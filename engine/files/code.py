"""Identify the program that is running by a hash of its Python files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
_CODE = ("engine", "kernels", "checkpoint_convert", "tools")


def code_files(package: Path) -> dict[str, str]:
    """Return a hash of every Python file of the package ``retemper``, by path in it."""
    paths = [package / "__init__.py", *(path for part in _CODE for path in sorted((package / part).rglob("*.py")))]
    return {path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def digest(facts: dict[str, str]) -> str:
    """Return one hash of all ``facts``."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
