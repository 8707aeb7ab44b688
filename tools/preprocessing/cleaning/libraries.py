"""The optional libraries of cleaning steps."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

from ....engine.errors import UserError, install_command
from ..options import PreprocessOptions


def import_library(name: str, option: str) -> ModuleType:
    """Import a library. Raise UserError with the installing command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{option} needs {name}: {install_command(name)}") from None


def cleaning_libraries(options: PreprocessOptions) -> str | None:
    """Return the libraries that decide the texts, with their versions; None if no option needs one."""
    used = [("ftfy", "--fix-text", options.fix_text), ("py3langid", "--languages", options.languages)]
    versions = []
    for name, option, is_used in used:
        if is_used:
            import_library(name, option)
            versions.append(f"{name} {metadata.version(name)}")
    return ", ".join(versions) or None
