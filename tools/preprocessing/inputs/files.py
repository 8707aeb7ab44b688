"""Expands ``--input FILE|DIR|GLOB|- ...`` to a checked, ordered list of files.

The order of the list is the order of the documents: that of the arguments, and by path within a folder or pattern. A
file that is named twice is refused: to repeat data, give its dataset a larger weight in training.
"""

from __future__ import annotations

import functools
import glob
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, NoReturn

from ....engine.errors import UserError
from ....engine.files.outputs import open_new
from ....engine.files.paths import is_url
from ..formats import FORMATS, format_of, known_formats, split_compression
from ..records.errors import DamagedError
from ..storage import FileFacts, facts, same_path
from .detection import detect
from .folders import choose_files, hub_snapshot
from .remote import expand_url
from .unsupported import remedy

STDIN = "-"
_REQUESTS = 16
"""Remote files that are opened at the same time."""


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    """A local path or a URL."""
    source: int
    """Index of the ``--input`` argument that named it."""
    format: str
    """Key of ``FORMATS``."""
    compression: str
    """A value of ``COMPRESSIONS``, or ""."""
    size: int
    """Bytes as stored."""
    version: str
    """What changes with the contents: of local files the time of the last change, in nanoseconds; of remote files a
    checksum where there is one."""
    units: int = 1
    """Number of units of formats that are divided between units."""


@dataclass(frozen=True)
class InputOptions:
    """How inputs are interpreted."""

    txt_mode: str = "file"
    """"file": a text file is a document; "line": each line is one."""
    stdin_format: str = "jsonl"
    """Format of standard input (``-``)."""
    input_format: str | None = None
    """Format of all files; None: by name and content."""
    keys: tuple[str, ...] | None = None
    """Keys of the text, which identify lines of JSON in a .txt file; None: any."""
    skip_damage: bool = False
    """Let the reader report damaged files."""
    hf_subset: str | None = None
    """Subset of datasets of the Hugging Face Hub; None: the default one."""
    hf_split: str | None = None
    """Split of datasets of the Hugging Face Hub; None: the only one, or train."""


class InputFacts(NamedTuple):
    """What identifies the contents of an input file without reading them."""

    path: str
    size: int
    """Bytes."""
    identity: str
    """See ``InputFile.version``."""


def describe_inputs(
    arguments: Sequence[str], options: InputOptions | None = None, flag: str = "--input"
) -> list[InputFacts]:
    """Return the facts of the files that :func:`expand_inputs` would return, without opening named files.

    Standard input has the size 0 and no identity.

    Raises:
        UserError: an argument names nothing, or a file named before.
    """
    named = _named_files(arguments, options or InputOptions(), flag)
    return [InputFacts(path, *((0, "") if path == STDIN else _size_and_version(path, flag))) for _, path in named]


def expand_inputs(arguments: Sequence[str], options: InputOptions, flag: str = "--input") -> list[InputFile]:
    """Return the files that ``arguments`` of the option ``flag`` name, in the order of their documents.

    A folder means its documents at any depth, which ``folders.py`` selects; notes name the files that are left out.
    Symbolic links are followed; a file reached twice within a folder counts once. A pattern (``*``, ``?``, ``[...]``,
    ``**``) means the files and folders that it matches; one that ends in ``*`` or ``**`` is treated like a folder.
    A URL means the same as a path, in a file system that fsspec knows. ``-`` is standard input;
    :func:`with_stdin_copied` turns it into a file.

    Raises:
        UserError: an argument names nothing, a file of unknown format, an unreadable file, or a file named before.
    """
    named = _named_files(arguments, options, flag)

    def describe(source: int, path: str) -> InputFile:
        if path == STDIN:
            return InputFile(STDIN, source, _in_mode(options.stdin_format, options), "", 0, "")
        return _input_file(path, source, options, flag)

    # Remote files are opened at the same time, because each request takes as long as reading megabytes.
    with ThreadPoolExecutor(_REQUESTS) if any(is_url(path) for _, path in named) else nullcontext() as pool:
        files = list((pool.map if pool else map)(describe, *zip(*named, strict=True)))
    _print_notes(files, options)
    return files


def _named_files(arguments: Sequence[str], options: InputOptions, flag: str) -> list[tuple[int, str]]:
    """Return the files of all arguments, each with the index of its argument."""
    named: list[tuple[int, str]] = []
    seen: dict[str, str] = {}
    for source, argument in enumerate(arguments):
        name = f"{flag} {argument}"
        for path in [argument] if argument == STDIN else _expand(argument, name, options):
            identity = STDIN if path == STDIN else same_path(path)
            if identity in seen:
                raise UserError(
                    f"{name}: {path} is already an input, as {seen[identity]}; name each file once (to repeat data, "
                    "give its dataset a larger weight in training)"
                )
            seen[identity] = path
            named.append((source, path))
    return named


def with_stdin_copied(files: Sequence[InputFile], copy: Path) -> list[InputFile]:
    """Return ``files`` with standard input copied to the file ``copy``. Raise UserError if it is a terminal."""
    if not any(file.path == STDIN for file in files):
        return list(files)
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--input -: standard input is a terminal; pipe the corpus into it")
    if not copy.exists():  # else it was copied earlier in this run
        with open_new(copy) as target:
            shutil.copyfileobj(sys.stdin.buffer, target, 8 << 20)
    size, version = _size_and_version(str(copy), "--input")
    return [
        replace(file, path=str(copy), size=size, version=version, units=_units(file.format, str(copy)))
        if file.path == STDIN
        else file
        for file in files
    ]


def _expand(argument: str, name: str, options: InputOptions) -> list[str]:
    """Return the files of one argument, by path."""
    if is_url(argument):
        choose = functools.partial(_chosen, options=options)
        return expand_url(argument, name, choose, options.hf_subset, options.hf_split)
    if os.path.isdir(argument):
        return _chosen(name, _files_below(argument), options)
    if os.path.exists(argument):
        return [argument]
    if not glob.has_magic(argument):
        raise UserError(f"{name}: no such file or folder")
    anything = Path(argument).name in ("*", "**", "*.*")
    if "**" in Path(argument).parts:
        named, below = _match_at_any_depth(argument)
    else:
        named, below = [], []
        for match in glob.glob(argument):
            if os.path.isdir(match):
                found = _files_below(match)
                below += found if anything else _chosen(match, found, options)
            else:
                named.append(match)
    if anything and (named or below):
        return _chosen(name, sorted({*named, *below}), options)
    if below and "**" in Path(argument).parts:
        below = _chosen(name, sorted(set(below)), options)
    if not named and not below:
        raise UserError(f"{name}: no file matches this pattern")
    return sorted({*named, *below})


def _chosen(name: str, paths: list[str], options: InputOptions) -> list[str]:
    return choose_files(name, paths, options.keys, any_name=options.input_format is not None)


def _match_at_any_depth(pattern: str) -> tuple[list[str], list[str]]:
    """Return the files that match a pattern with ``**``, and the files in folders that match it.

    The glob module would follow cycles of symbolic links.
    """
    parts = Path(pattern).parts
    depth = parts.index("**")
    rest = parts[depth:]
    named: list[str] = []
    below: list[str] = []
    for root in filter(os.path.isdir, glob.glob(os.path.join(*parts[:depth])) if depth else ["."]):
        for path in _walk(root)[0]:
            names = Path(path).relative_to(root).parts
            if rest[-1] != "**" and _matches(names, rest):
                named.append(path)
            elif any(_matches(names[:count], rest) for count in range(1, len(names) + 1)):
                below.append(path)
    return named, below


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether the path ``names`` matches ``pattern``, in which ``**`` is any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _files_below(folder: str) -> list[str]:
    """Return all files below ``folder`` by path, except hidden ones."""
    files, again = _walk(folder)
    if again:
        print(
            f"note: {folder}: left out {len(again)} links to files that are read anyway, {again[0]} first",
            file=sys.stderr,
        )
    return files


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """Return the files below ``folder`` by path, and the links that lead to files found without them.

    Hidden files and folders are left out. Links are followed last, and not to folders that contain them.
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
            if snapshot := hub_snapshot(here, folders):
                folders.clear()
                roots.append(snapshot)
                continue
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
            again.append(link)  # noqa: PERF401  # setdefault has side effects
    return sorted(files.values()), sorted(again)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _input_file(path: str, source: int, options: InputOptions, flag: str) -> InputFile:
    name = f"{flag} {path}"
    found = format_of(path)
    if options.input_format is None and found is None and (known := remedy(path)):
        raise UserError(f"{name}: {known}")
    if not is_url(path):
        _require_readable(path, name)
    named = found[0].name if found else None
    compression = found[1] if found else split_compression(path.lower())[1]
    detected = detect(path, options.input_format or named, compression, options.input_format is not None, options.keys)
    if detected.format is None:
        raise UserError(
            f"{name}: unknown format; known are {known_formats()}, and most of them as .gz, .zst, .bz2 and .xz; "
            "--input-format sets the format of files with other names"
        )
    if detected.compression and not FORMATS[detected.format].compressible:
        raise UserError(f"{name}: {detected.format} in {detected.compression} compression; decompress it first")
    form = _in_mode(detected.format, options)
    size, version = _size_and_version(path, flag)
    return InputFile(path, source, form, detected.compression, size, version, _units(form, path, options.skip_damage))


def _require_readable(path: str, name: str) -> None:
    if not os.path.exists(path):
        raise UserError(f"{name}: a broken symbolic link")
    if not os.path.isfile(path):
        raise UserError(f"{name}: not a regular file; write the text to a file first, or pipe it to --input -")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name}: no permission to read it")


def _size_and_version(path: str, flag: str) -> FileFacts:
    try:
        return facts(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from error


def _print_notes(files: Sequence[InputFile], options: InputOptions) -> None:
    """Print which files have another format than their name says, and mixtures of records and plain texts."""
    if options.input_format is not None:
        return
    by_content: dict[tuple[str, str], list[str]] = {}
    for file in files:
        found = None if file.path == STDIN else format_of(file.path)
        if found and file.format not in (found[0].name, _in_mode(found[0].name, options)):
            by_content.setdefault((found[0].name, file.format), []).append(file.path)
    for (named, read_as), paths in by_content.items():
        if not (named == "json" and read_as == "jsonl"):
            more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
            print(
                f"note: {paths[0]}{more}: read as {read_as} because of its content, although it is named {named} "
                f"(--input-format {named} reads it as named)",
                file=sys.stderr,
            )
    counts = Counter(file.format for file in files)
    kinds = {FORMATS[name].has_records for name in counts}
    if len(kinds) > 1:
        mixture = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
        print(f"note: the input mixes files of records and files that are one text each: {mixture}", file=sys.stderr)


def _in_mode(format_name: str, options: InputOptions) -> str:
    return "txt-lines" if format_name == "txt" and options.txt_mode == "line" else format_name


def _units(format_name: str, path: str, skip_damage: bool = False) -> int:
    form = FORMATS[format_name]
    try:
        return form.count_units(path) if form.split == "units" else 1
    except DamagedError:
        if not skip_damage:
            raise
        return 1  # its reader reports the damage
