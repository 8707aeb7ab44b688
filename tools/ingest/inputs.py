"""Which files a corpus is: ``--input FILE|DIR|GLOB|- ...`` expanded to a checked, ordered list.

The order of documents in the dataset is the order of this list: the arguments in the order given, and within a folder
or a pattern by path. A file that is named twice is refused, since repeating data is a decision for the blend.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

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


def expand_inputs(arguments: Sequence[str], options: InputOptions, flag: str = "--input") -> list[InputFile]:
    """The files that ``arguments`` of the option ``flag`` name, in the order of their documents.

    A folder stands for all files of known formats in it, at any depth, except hidden ones; files of other formats there
    are left out, which is said once. Symbolic links are followed; what is reached twice within a folder counts once. A
    pattern (``*``, ``?``, ``[...]``, ``**``) stands for the files and folders that it matches. ``-`` is standard input,
    which :func:`with_stdin_copied` makes a file.

    Raises:
        UserError: an argument names nothing, a file of unknown format, one that cannot be read, or one named before.
    """
    files: list[InputFile] = []
    seen: dict[str, str] = {}
    for source, argument in enumerate(arguments):
        name = f"{flag} {argument}"
        for path in [argument] if argument == STDIN else _expand(argument, name):
            identity = STDIN if path == STDIN else os.path.realpath(path)
            if identity in seen:
                raise UserError(
                    f"{name}: {path} is already an input, as {seen[identity]}; name each file once (to repeat data, "
                    "give its dataset a larger weight in training)"
                )
            seen[identity] = path
            if path == STDIN:
                files.append(InputFile(STDIN, source, _in_mode(options.stdin_format, options), "", 0, 0))
            else:
                files.append(_input_file(path, source, options, flag))
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


def _expand(argument: str, name: str) -> list[str]:
    """The files that one argument stands for, by path."""
    if os.path.isdir(argument):
        return _files_below(argument) or _refuse_folder(name)
    if os.path.exists(argument):
        return [argument]
    if not glob.has_magic(argument):
        raise UserError(f"{name}: no such file or folder")
    if "**" in Path(argument).parts:
        found = set(_match_at_any_depth(argument))
    else:
        found = set()
        for match in glob.glob(argument):
            found.update((_files_below(match) or _refuse_folder(match)) if os.path.isdir(match) else [match])
    if not found:
        raise UserError(f"{name}: no file matches this pattern")
    return sorted(found)


def _refuse_folder(name: str) -> NoReturn:
    raise UserError(f"{name}: no {known_formats()} file in this folder")


def _match_at_any_depth(pattern: str) -> Iterator[str]:
    """What a pattern with ``**`` stands for. The glob module would follow symbolic links round and round."""
    parts = Path(pattern).parts
    depth = parts.index("**")
    rest = parts[depth:]
    for root in filter(os.path.isdir, glob.glob(os.path.join(*parts[:depth])) if depth else ["."]):
        known, others, _ = _walk(root)
        for path in known:
            names = Path(path).relative_to(root).parts
            # A folder that matches stands for the files of known formats in it.
            if any(_matches(names[:count], rest) for count in range(1, len(names) + 1)):
                yield path
        for path in others if rest[-1] != "**" else ():
            if _matches(Path(path).relative_to(root).parts, rest):
                yield path


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the path of ``names`` matches ``pattern``, in which ``**`` stands for any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _files_below(folder: str) -> list[str]:
    """All files of known formats below ``folder``, by path; what else is there is said."""
    known, others, again = _walk(folder)
    if known and others:
        print(f"{folder}: left out {len(others)} files of other formats, {others[0]} first", file=sys.stderr)
    if known and again:
        print(f"{folder}: left out {len(again)} links to what is there already, {again[0]} first", file=sys.stderr)
    return known


def _walk(folder: str) -> tuple[list[str], list[str], list[str]]:
    """The files below ``folder``, by path: of known formats, of others, and links to what is there without them.

    Hidden files and folders are left out. Links are followed after everything else, and not to folders around them.

    Raises:
        UserError: a folder cannot be read.
    """
    files: dict[str, str] = {}
    visited: set[str] = set()
    file_links: list[str] = []
    again: list[str] = []
    roots = deque([folder])
    while roots:
        root = roots.popleft()
        for here, folders, names in os.walk(root, onerror=_refuse_unreadable):
            real = os.path.realpath(here)
            if real in visited:
                again.append(here)
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if name[0] != ".")
            for name in [name for name in folders if os.path.islink(os.path.join(here, name))]:
                link = os.path.join(here, name)
                is_loop = Path(real).is_relative_to(os.path.realpath(link))
                (again if is_loop else roots).append(link)
            for name in names:
                if name[0] != ".":
                    path = os.path.join(here, name)
                    if os.path.islink(path):
                        file_links.append(path)
                    else:
                        files[os.path.join(real, name)] = path
    for link in sorted(file_links):
        if files.setdefault(os.path.realpath(link), link) != link:
            again.append(link)
    known: list[str] = []
    others: list[str] = []
    for path in sorted(files.values()):
        (known if format_of(path) else others).append(path)
    return known, others, sorted(again)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _input_file(path: str, source: int, options: InputOptions, flag: str) -> InputFile:
    found = format_of(path)
    if found is None:
        raise UserError(f"{flag} {path}: unknown format; known are {known_formats()}, and most of them as .gz and .zst")
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: a symbolic link to nothing")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: no regular file; write the text to a file first, or pipe it to --input -")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: no permission to read it")
    form, compression = found
    name = _in_mode(form.name, options)
    status = os.stat(path)
    return InputFile(path, source, name, compression, status.st_size, status.st_mtime_ns, _units(name, path))


def _in_mode(format_name: str, options: InputOptions) -> str:
    return "txt-lines" if format_name == "txt" and options.txt_mode == "line" else format_name


def _units(format_name: str, path: str) -> int:
    form = FORMATS[format_name]
    return form.count_units(path) if form.split == "units" else 1
