"""The supported formats: their suffixes, how files are divided, and their readers, which are imported when needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from ...engine.errors import UserError, install_command
from .records.reading import Reader

COMPRESSIONS = {".gz": ".gz", ".gzip": ".gz", ".zst": ".zst", ".zstd": ".zst", ".bz2": ".bz2", ".xz": ".xz"}
"""Suffixes of compressed files, and the compression, named by its usual suffix."""


@dataclass(frozen=True)
class Format:
    """One format."""

    name: str
    suffixes: tuple[str, ...]
    module: str
    """Module of readers/ with ``read(span, context)``."""
    split: Literal["bytes", "units", "whole"] = "whole"
    """How a file is divided for several workers: anywhere (a record belongs to the range with its first byte), between
    the units that the module's ``count_units(path)`` counts, or not at all, like all compressed files."""
    compressible: bool = False
    """Whether whole files may be compressed."""
    has_records: bool = True
    """Whether a file contains records; else its text is one document."""

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
        Format("jsonl", (".jsonl", ".ndjson", ".jsonlines", ".jl"), "lines", "bytes", compressible=True),
        Format("json", (".json",), "json_array", compressible=True),
        Format("txt", (".txt",), "text", compressible=True, has_records=False),
        Format("txt-lines", (), "lines", "bytes", compressible=True, has_records=False),
        Format("csv", (".csv",), "delimited", compressible=True),
        Format("tsv", (".tsv",), "delimited", compressible=True),
        Format("parquet", (".parquet",), "parquet", "units"),
        Format("arrow", (".arrow", ".feather"), "arrow"),
        Format("xlsx", (".xlsx",), "xlsx"),
        Format("pdf", (".pdf",), "pdf", has_records=False),
        Format("markdown", (".md", ".markdown"), "markup", compressible=True, has_records=False),
        Format("html", (".html", ".htm"), "markup", compressible=True, has_records=False),
    )
}


def format_of(path: str) -> tuple[Format, str] | None:
    """Return format and compression (a value of ``COMPRESSIONS`` or "") of a file by its name; None if unknown."""
    stem, compression = split_compression(path.lower())
    for form in FORMATS.values():
        if stem.endswith(form.suffixes) and (form.compressible or not compression):
            return form, compression
    return None


def split_compression(path: str) -> tuple[str, str]:
    """Return ``path`` without the suffix of a compressed file, and the compression."""
    suffix = next((end for end in COMPRESSIONS if path.endswith(end)), "")
    return path.removesuffix(suffix), COMPRESSIONS.get(suffix, "")


def known_formats() -> str:
    """Return all suffixes, for messages."""
    return ", ".join(suffix for form in FORMATS.values() for suffix in form.suffixes)


def require_library(name: str, path: str) -> ModuleType:
    """Import an optional library. Raise UserError with the installing command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and error.name in (name, package)
        raise UserError(
            f"{path}: reading it needs {package}"
            + (": " if is_missing else f", which cannot be imported ({error}): ")
            + install_command(package)
        ) from None
