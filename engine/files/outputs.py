"""Protect existing files from a command's outputs: no input is replaced, and no file that is not the program's own.

Each command passes everything that it reads and writes to :func:`require_separate` before it creates anything.
Files of a dataset are recognised in data/dataset_files.py, reports here. Temporary files are created exclusively.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import UserError
from .atomic import replace_file

GENERATOR = "retemper-report"
"""Mark in a report, by which a later run of the command recognises it as its own."""
_MARK = re.compile(
    rb'<meta name="generator" content="%(name)b">|\A\s*\{\s*"generator":\s*"%(name)b"|Software\0%(name)b|'
    rb"/Creator \(%(name)b\)|<dc:title>%(name)b<" % {b"name": GENERATOR.encode()}
)
_MARK_BYTES = 4096  # searched at the start of a report, and of a PDF at its end


class Use(NamedTuple):
    """A path that a command reads or writes, and its option, such as ``--input``."""

    option: str
    path: str | os.PathLike[str]


def require_separate(reads: Iterable[Use], files: Iterable[Use] = (), folders: Iterable[Use] = ()) -> None:
    """Refuse a command whose outputs would replace its inputs or be inside them.

    Paths are compared as files, by device and inode: so links, other spellings and names that a file system treats as
    equal are recognised. A path that does not exist yet cannot be an input.

    Args:
        reads: files, and folders such as a model's.
        files: to be created, replaced or removed.
        folders: to be created or replaced as a whole.

    Raises:
        UserError: one of ``files`` is read; or a folder is inside a folder that is read, or contains an input.
    """
    files, folders = list(files), list(folders)
    written = {identity: use for use in files if (identity := _identity(use.path)) is not None}
    around = [(use, _identity(use.path), _identities_above(os.path.realpath(use.path))) for use in folders]
    above_of: dict[str, set[tuple[int, int]]] = {}
    for read in reads:
        identity = _identity(read.path)
        if identity is None:
            continue
        if (write := written.get(identity)) is not None:
            raise UserError(f"{write.option}: {os.fspath(write.path)} is an input ({_named(read)}); choose another")
        for folder, itself, above in around:
            if identity == itself or identity in above:
                raise UserError(f"{folder.option}: it is inside {_named(read)}; name a folder elsewhere")
            if itself is None:
                continue
            real = os.path.realpath(read.path) if os.path.islink(read.path) else os.fspath(read.path)
            place = os.path.dirname(real)
            if place not in above_of:  # once for a folder with a hundred thousand files
                above_of[place] = _identities_above(os.path.join(os.path.realpath(place), "file"))
            if itself in above_of[place]:
                raise UserError(
                    f"{folder.option}: {os.fspath(folder.path)} holds an input ({_named(read)}); choose another"
                )


def _named(use: Use) -> str:
    return f"{use.option} {os.fspath(use.path)}"


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return device and inode of the target of ``path``; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _identities_above(path: str) -> set[tuple[int, int]]:
    """Return the identities of the folders that contain the real path ``path``, which need not exist."""
    identities = map(_identity, Path(path).parents)
    return {identity for identity in identities if identity is not None}


def open_new(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a temporary file for writing, replacing one that a killed run left. A link is never followed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb")


def require_own_folder(folder: Path, lock: str, option: str) -> None:
    """Refuse a work folder, which is going to be emptied, that does not belong to the program.

    Args:
        lock: name of the file that such a folder holds from its beginning.
        option: the option for the output, for the error.

    Raises:
        UserError: it is a link, or a file, or holds other files and no ``lock``.
    """
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        return
    own = stat.S_ISDIR(mode) and (os.path.lexists(folder / lock) or not os.listdir(folder))
    if not own:
        raise UserError(f"{option}: its temporary folder {folder} was not created by this program; move it away")


def require_report(option: str, path: str | os.PathLike[str], reads: Iterable[Use] = ()) -> None:
    """Refuse a report that could not be written, or would replace a file that is not a report of this program.

    An empty file may be replaced, and devices and pipes (``/dev/stdout``) are written to.

    Args:
        option: the option for the report, such as ``--json``.
        reads: the command's inputs.

    Raises:
        UserError: it is a folder, its folder does not exist, it is not writable, or it is a file of another kind.
    """
    path = Path(path)
    name = f"{option} {path}"
    require_separate(reads, [Use(name, path)])
    if path.is_dir():
        raise UserError(f"{name}: is a folder; name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{name}: the folder {folder} does not exist; create it, or name another file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{name}: no permission to write it; name another file")
    if not _written_through(path) and not _is_own_report(path):
        raise UserError(f"{name}: exists, and is not a report of this command; move it away, or name another file")


def write_report(option: str, path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a report, marked with ``GENERATOR``; it appears under its name when it is complete.

    Raises:
        UserError: it cannot be written, or a file of another kind has been created there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    require_report(option, path)
    try:
        if _written_through(path):
            with open(path, "wb") as file:
                file.write(data)
            return
        replace_file(path, [data])
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror or error}") from error


def write_json_report(option: str, path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write ``record`` as a report; see :func:`write_report`. JSON has no NaN and no infinity: they become null."""
    content = finite({"generator": GENERATOR, **record})
    write_report(option, path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return ``value``, of JSON's types, with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _written_through(path: Path) -> bool:
    """Return whether ``path`` is a device or pipe, or the kernel's name for an open file."""
    if str(path.absolute()).startswith(("/dev/", "/proc/")):
        return True
    return path.exists() and not path.is_file()


def _is_own_report(path: Path) -> bool:
    """Return whether the report ``path`` may be replaced: it does not exist, is empty, or is a report of this
    program.
    """
    if not os.path.lexists(path):
        return True
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_MARK_BYTES)
            file.seek(max(size - _MARK_BYTES, 0))
            tail = file.read(_MARK_BYTES)
    except OSError:
        return False
    return size == 0 or bool(_MARK.search(head)) or bool(head.startswith(b"%PDF") and _MARK.search(tail))
