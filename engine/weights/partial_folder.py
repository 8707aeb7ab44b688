"""Write a large output folder that appears when complete, and keeps finished files after an interruption.

``.{name}.{key}.partial/`` is next to the output. Its key is a hash of everything that determines the content, so that
other commands do not use it. It holds ``content/``, which becomes the output by one rename; ``journal.jsonl``, a line
for every finished file with its hash; and a lock, so that the same command does not run twice at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from ..errors import UserError
from ..files.atomic import require_absent, sync_file, sync_path, sync_tree
from ..files.hashing import FileRecord, record_file
from ..files.lock import exclusive_lock
from ..files.outputs import require_own_folder
from ..files.removal import remove_tree
from .block_copy import Hashes, WrittenFile

_CONTENT, _JOURNAL, _LOCK = "content", "journal.jsonl", ".lock"
_SUFFIX = ".partial"


class DiscardOutput(UserError):
    """An error that makes all written files useless, so that none is kept."""


class PartialFolder:
    """The folder that is being written."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.content = folder / _CONTENT
        """The folder that becomes the output."""
        if self.content.is_symlink():
            self.content.unlink()
        self.content.mkdir(exist_ok=True)
        self.done = self._read_journal()
        """Files that an earlier run has finished, by name. :meth:`verified` verifies them."""

    def clear(self, reuse: bool) -> None:
        """Remove files that no earlier run has finished, such as its copies of small files, or all of them."""
        if not reuse:
            (self._folder / _JOURNAL).unlink(missing_ok=True)
            self.done = {}
        for path in sorted(self.content.rglob("*"), reverse=True):  # the content of a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.content).as_posix() not in self.done:
                path.unlink()

    def record(self, file: WrittenFile) -> None:
        """Record that ``file`` is complete and on the disk."""
        with open(self._folder / _JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(file)) + "\n")
            sync_file(journal)
        self.done[file.name] = file

    def verified(self, name: str, on_bytes: Callable[[int], object] = lambda count: None) -> WrittenFile | None:
        """Read the finished file ``name`` back and return it; None if it has to be written."""
        file, path = self.done.get(name), self.content / name
        if file is None or not path.is_file() or path.stat().st_size != file.record.bytes:
            return None
        return file if record_file(path, on_bytes) == file.record else None

    def _read_journal(self) -> dict[str, WrittenFile]:
        path = self._folder / _JOURNAL
        done = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                tensors = {name: Hashes(**hashes) for name, hashes in entry["tensors"].items()}
                done[entry["name"]] = WrittenFile(entry["name"], FileRecord(**entry["record"]), tensors)
            except (ValueError, KeyError, TypeError):  # a line that a killed run did not finish
                continue
        return done


@contextmanager
def partial_folder(
    output: Path, identity: Mapping[str, Any], say: Callable[[str], None] = print, reuse: bool = True
) -> Iterator[PartialFolder]:
    """Yield a folder to write ``output`` in; it is flushed to disk and renamed at the end.

    After Ctrl-C, a full disk, or an unreadable source, finished files are kept, and the same command can continue from
    them; a message reports this. After :class:`DiscardOutput` and internal errors everything is removed.

    Args:
        output: the folder to make.
        identity: everything that determines its content, for JSON.
        say: receives the lines about reused and kept files.
        reuse: whether to use files that an earlier run has finished.

    Raises:
        UserError: ``output`` exists, cannot be written, or is being written by the same command.
    """
    require_absent(output)
    key = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
    folder = output.parent / f".{output.name}.{key}{_SUFFIX}"
    renamed, kept = False, ""

    def held_by(holder: str) -> str:
        return f"--output {output}: {holder} is writing it with the same command (it holds {folder}); wait for it"

    try:
        require_own_folder(folder, _LOCK, f"--output {output}")
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / _LOCK, held_by):
            try:
                partial = PartialFolder(folder)
                partial.clear(reuse)
                _describe_present(output, partial, folder, say)
                yield partial
                sync_tree(partial.content)
                require_absent(output)
                partial.content.rename(output)
                renamed = True
                sync_path(output.parent)
            except DiscardOutput:
                raise
            except (OSError, UserError, KeyboardInterrupt) as error:
                kept = _describe_kept(folder) if reuse and not renamed else ""
                if isinstance(error, KeyboardInterrupt):
                    if kept:
                        say(kept)
                    raise
                reason = _describe(error, output, renamed) if isinstance(error, OSError) else str(error)
                raise UserError(f"{reason}; {kept}" if kept else reason) from error
            finally:
                if not kept:
                    remove_tree(folder)
    except OSError as error:
        raise UserError(_describe(error, output)) from error


def _describe(error: OSError, output: Path, renamed: bool = False) -> str:
    what = "is complete, but its name could not be flushed to the disk" if renamed else "cannot be written"
    return f"--output {output}: {what}: {error.strerror or error}"


def _describe_kept(folder: Path) -> str:
    """Return a message about the finished files in ``folder``; empty if there are none."""
    done = PartialFolder(folder).done if folder.is_dir() else {}
    if not done:
        return ""
    return f"{len(done)} finished files are kept in {folder}: the same command continues from them; or remove it"


def _describe_present(output: Path, partial: PartialFolder, folder: Path, say: Callable[[str], None]) -> None:
    if partial.done:
        say(f"continuing from {len(partial.done)} finished files in {folder}")
    for other in sorted(output.parent.iterdir()):
        if other != folder and other.name.startswith(f".{output.name}.") and other.name.endswith(_SUFFIX):
            say(f"{other} is the unfinished output of another command, input or version; it is not used, remove it")
