"""The formats that are read: by which suffix they are known, how they are split, and what reads them.

A reader's module is imported when a file of its format is read; libraries of heavy formats are extras.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from ...engine.errors import UserError
from .records import Reader

COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Format:
    """One format."""

    name: str
    suffixes: tuple[str, ...]
    module: str
    """Module beside this one, under readers/, that has ``read(span, context)``."""
    split: Literal["bytes", "units", "whole"] = "whole"
    """How a file is cut for several workers: anywhere (a record belongs to the range in which its first byte lies),
    between units of which the module's ``count_units(path)`` says the number, or not at all. Compressed: not at all."""
    compressible: bool = False
    """Whether it may also be .gz or .zst."""

    @property
    def read(self) -> Reader:
        """The reader."""
        return self._attribute("read")

    @property
    def count_units(self) -> Callable[[str], int]:
        """Number of units in a file."""
        return self._attribute("count_units")

    def _attribute(self, name: str) -> Callable:
        return getattr(importlib.import_module(f".readers.{self.module}", __package__), name)


FORMATS = {
    form.name: form
    for form in (
        Format("jsonl", (".jsonl", ".ndjson"), "lines", "bytes", compressible=True),
        Format("json", (".json",), "json_array", compressible=True),
        Format("txt", (".txt",), "text", compressible=True),
        Format("txt-lines", (), "lines", "bytes", compressible=True),
        Format("csv", (".csv",), "delimited", compressible=True),
        Format("tsv", (".tsv",), "delimited", compressible=True),
        Format("parquet", (".parquet",), "parquet", "units"),
        Format("xlsx", (".xlsx",), "xlsx"),
        Format("pdf", (".pdf",), "pdf"),
        Format("markdown", (".md", ".markdown"), "markup", compressible=True),
        Format("html", (".html", ".htm"), "markup", compressible=True),
    )
}


def format_of(path: str) -> tuple[Format, str] | None:
    """Format and compression (".gz", ".zst" or "") of a file, by its name; None when it is not known."""
    name = path.lower()
    compression = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    stem = name.removesuffix(compression)
    for form in FORMATS.values():
        if stem.endswith(form.suffixes) and (form.compressible or not compression):
            return form, compression
    return None


def known_formats() -> str:
    """All suffixes, for messages."""
    return ", ".join(suffix for form in FORMATS.values() for suffix in form.suffixes)


def require_library(name: str, path: str) -> ModuleType:
    """Import an optional library.

    Raises:
        UserError: it is not installed, with the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and error.name in (name, package)
        raise UserError(
            f"{path}: reading it needs {package}"
            + (": " if is_missing else f", which cannot be imported ({error}): ")
            + f"pip install 'retemper[formats]' (or {package})"
        ) from None
