"""Which files a corpus is: ``--input FILE|DIR|GLOB|- ...`` expanded to a checked, ordered list.

The order of documents in the dataset is the order of this list: the arguments in the order given, and within a folder
or a pattern by path. A file that is named twice is refused, since repeating data is a decision for the blend.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...engine.errors import UserError
from .formats import FORMATS, format_of, known_formats

STDIN = "-"


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    source: int
    """Index of the ``--input`` argument that named it."""
    format: str
    """Key of ``FORMATS``."""
    compression: str
    """".gz", ".zst" or ""."""
    size: int
    """Bytes on disk."""
    modified: int
    """Time of the last change, in nanoseconds."""
    units: int = 1
    """For formats that are cut between units: how many."""


@dataclass(frozen=True)
class InputOptions:
    """How inputs are understood."""

    txt_mode: str = "file"
    """"file": a text file is a document; "line": each of its lines is."""
    stdin_format: str = "jsonl"
    """Format of what comes through standard input (``-``)."""


def expand_inputs(arguments: Sequence[str], options: InputOptions) -> list[InputFile]:
    """The files that ``arguments`` name, in the order of their documents.

    A folder stands for all files of known formats in it, at any depth, except hidden ones; files of other formats there
    are left out, which is said once. A pattern (``*``, ``?``, ``[...]``, ``**``) stands for what it matches. ``-`` is
    standard input, which :func:`with_stdin_copied` makes a file.

    Raises:
        UserError: an argument names nothing, a file of unknown format, one that cannot be read, or one named before.
    """
    files: list[InputFile] = []
    seen: dict[str, str] = {}
    for source, argument in enumerate(arguments):
        for path in [argument] if argument == STDIN else _expand(argument):
            identity = os.path.realpath(path)
            if identity in seen:
                raise UserError(
                    f"--input {argument}: {path} is already an input, as {seen[identity]}; name each file once (to "
                    "repeat data, give its dataset a larger weight in training)"
                )
            seen[identity] = path
            is_stdin = path == STDIN
            files.append(
                InputFile(STDIN, source, options.stdin_format, "", 0, 0)
                if is_stdin
                else _input_file(path, source, options)
            )
    return files


def with_stdin_copied(files: Sequence[InputFile], copy: Path) -> list[InputFile]:
    """``files``, standard input being the file ``copy`` of what it gives: several workers can read that.

    Raises:
        UserError: standard input is a terminal.
    """
    if not any(file.path == STDIN for file in files):
        return list(files)
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--input -: standard input is a terminal; pipe the corpus into it")
    with open(copy, "wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target, 8 << 20)
    status = copy.stat()
    return [
        replace(
            file, path=str(copy), size=status.st_size, modified=status.st_mtime_ns, units=_units(file.format, str(copy))
        )
        if file.path == STDIN
        else file
        for file in files
    ]


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
                (found if format_of(name) else others).append(os.path.join(here, name))
    if not found:
        raise UserError(f"--input {folder}: no {known_formats()} file in this folder")
    if others:
        print(f"{folder}: left out {len(others)} files of other formats, {min(others)} first", file=sys.stderr)
    return sorted(found)


def _input_file(path: str, source: int, options: InputOptions) -> InputFile:
    found = format_of(path)
    if found is None:
        raise UserError(
            f"--input {path}: unknown format; known are {known_formats()}, and most of them as .gz and .zst"
        )
    if not os.path.exists(path):
        raise UserError(f"--input {path}: a symbolic link to nothing")
    if not os.path.isfile(path):
        raise UserError(f"--input {path}: no regular file; write the text to a file first, or pipe it to --input -")
    if not os.access(path, os.R_OK):
        raise UserError(f"--input {path}: no permission to read it")
    form, compression = found
    name = "txt-lines" if form.name == "txt" and options.txt_mode == "line" else form.name
    status = os.stat(path)
    return InputFile(path, source, name, compression, status.st_size, status.st_mtime_ns, _units(name, path))


def _units(format_name: str, path: str) -> int:
    form = FORMATS[format_name]
    return form.count_units(path) if form.split == "units" else 1
