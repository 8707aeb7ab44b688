"""Which files a corpus is: ``--input FILE|DIR|GLOB ...`` expanded to a checked, ordered list.

The order of documents in the dataset is the order of this list: the arguments in the order given, and within a folder
or a pattern by path. A file that is named twice is refused, since repeating data is a decision for the blend.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ...engine.errors import UserError


class Format(Enum):
    """How a file's documents are read."""

    JSONL = ".jsonl"
    JSONL_GZ = ".jsonl.gz"
    JSONL_ZST = ".jsonl.zst"
    TXT = ".txt"


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    format: Format
    size: int
    """Bytes on disk."""


def expand_inputs(arguments: Sequence[str]) -> list[InputFile]:
    """The files that ``arguments`` name, in the order of their documents.

    A folder stands for all files of known formats in it, at any depth, except hidden ones; files of other formats there
    are left out, which is said once. A pattern (``*``, ``?``, ``[...]``, ``**``) stands for what it matches.

    Raises:
        UserError: an argument names nothing, a file of unknown format, one that cannot be read, or one named before.
    """
    files: list[InputFile] = []
    seen: dict[str, str] = {}
    for argument in arguments:
        for path in _expand(argument):
            identity = os.path.realpath(path)
            if identity in seen:
                raise UserError(
                    f"--input {argument}: {path} is already an input, as {seen[identity]}; name each file once (to "
                    "repeat data, give its dataset a larger weight in training)"
                )
            seen[identity] = path
            files.append(_input_file(path))
    return files


def _expand(argument: str) -> Iterator[str]:
    if os.path.isdir(argument):
        yield from _walk(argument)
    elif os.path.exists(argument):
        yield argument
    elif glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise UserError(f"--input {argument}: no file matches this pattern")
        for match in matches:
            # "**" matches folders as well as the files in them.
            if not os.path.isdir(match):
                yield match
            elif "**" not in argument:
                yield from _walk(match)
    else:
        raise UserError(f"--input {argument}: no such file or folder")


def _walk(folder: str) -> list[str]:
    """All files of known formats below ``folder``, by path, symbolic links followed."""
    found: list[str] = []
    others: list[str] = []
    visited: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(here))
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(here, name)) not in visited
        ]
        for name in names:
            if name[0] != ".":
                (found if _format_of(name) else others).append(os.path.join(here, name))
    if not found:
        raise UserError(f"--input {folder}: no {_known_formats()} file in this folder")
    if others:
        print(f"{folder}: left out {len(others)} files of other formats, {min(others)} first", file=sys.stderr)
    return sorted(found)


def _input_file(path: str) -> InputFile:
    form = _format_of(path)
    if form is None:
        raise UserError(f"--input {path}: unknown format; known are {_known_formats()}")
    if not os.path.exists(path):
        raise UserError(f"--input {path}: a symbolic link to nothing")
    if not os.path.isfile(path):
        raise UserError(f"--input {path}: no regular file; write the text to a file first")
    if not os.access(path, os.R_OK):
        raise UserError(f"--input {path}: no permission to read it")
    return InputFile(path, form, os.path.getsize(path))


def _format_of(path: str) -> Format | None:
    return next((form for form in Format if path.lower().endswith(form.value)), None)


def _known_formats() -> str:
    return ", ".join(form.value for form in Format)
