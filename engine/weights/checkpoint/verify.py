"""Verify checkpoints: every file has its size and hash, and no other file could be read as part of them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import UserError
from ...files.hashing import FileRecord, record_file
from ..damage import METADATA_FILE, TABLE_FILE, DamagedCheckpoint, file_inside
from ..workers import WorkerStopped, share_by_size
from .assets import ASSET_FOLDER
from .manifest import MANIFEST_FILE, Manifest, read_manifest

_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""Errors about a file that is lost. Others may be problems of the machine, not of the checkpoint."""
_READ = (TABLE_FILE, "*.safetensors", METADATA_FILE, "*.distcp", f"{ASSET_FOLDER}/*")
"""Patterns of the files that a run or a converter would read."""


@dataclass(frozen=True)
class Damage:
    """A file that differs from what was written."""

    file: str
    """Path in the checkpoint."""
    what: str
    """Full path, and the problem: the beginning of an error line."""


def find_damage(
    folder: Path,
    share: tuple[int, int] = (0, 1),
    only: Collection[str] | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> tuple[Manifest | None, list[Damage]]:
    """Compare the checkpoint ``folder`` with its manifest, reading every byte.

    A manifest of format 1 lists no files. Then only the sizes of the tensors' files are checked, against the metadata.

    Args:
        folder: of the checkpoint.
        share: (rank, number of ranks) that verify it together; each checks its share of the files.
        only: names of the files to check, instead of a share.
        on_bytes: called with the number of bytes of each block.

    Returns:
        The manifest, if it can be read, and the damage.

    Raises:
        UserError: it has an unknown format, or cannot be read.
    """
    try:
        if folder.is_dir() and not (folder / MANIFEST_FILE).is_file():
            raise DamagedCheckpoint(f"{folder}: {MANIFEST_FILE} is missing")
        manifest = read_manifest(folder)
        damage = [] if only is not None or share[0] else unlisted(folder, manifest)
        records = manifest.records
        if not records:
            _require_long_enough(folder)
        sizes = {name: record.bytes for name, record in records.items()}
        for name in only if only is not None else share_by_size(sizes, *share):
            if name in records:
                damage += _damage_of_file(folder, name, records[name], on_bytes)
        return manifest, damage
    except DamagedCheckpoint as error:
        return None, [Damage(MANIFEST_FILE, str(error).removesuffix("; use another checkpoint"))]


def require_undamaged(folder: Path, on_bytes: Callable[[int], object] = lambda count: None, workers: int = 1) -> None:
    """Verify every byte of the checkpoint ``folder``.

    Args:
        folder: of the checkpoint.
        on_bytes: called with the number of bytes of each block, from any of the threads.
        workers: threads that share the files.

    Raises:
        UserError: names the first damaged file.
    """
    stop = threading.Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise WorkerStopped
        on_bytes(count)

    with ThreadPoolExecutor(workers, "verify") as pool:
        futures = [pool.submit(find_damage, folder, (number, workers), None, advance) for number in range(workers)]
        try:
            damage = [found for future in futures for found in future.result()[1]]
        finally:
            stop.set()
    if damage:
        raise UserError(f"{damage[0].what}; use another checkpoint")


def _damage_of_file(folder: Path, name: str, record: FileRecord, on_bytes: Callable[[int], object]) -> list[Damage]:
    if damage := _damage_of_size(folder, name, record):
        return damage
    path = folder / name
    try:
        found = record_file(path, on_bytes)
    except OSError as error:
        return [_lost(folder, name, error)]
    if found.bytes != record.bytes:
        return [_wrong_size(path, name, found.bytes, record)]
    if found != record:
        return [Damage(name, f"{path}: damaged, its xxh3_128 is {found.xxh3_128}, {record.xxh3_128} was written")]
    return []


def _damage_of_size(folder: Path, name: str, record: FileRecord) -> list[Damage]:
    """Check a file without reading it."""
    try:
        size = file_inside(folder, name).stat().st_size
    except DamagedCheckpoint as error:
        return [Damage(name, str(error))]
    except OSError as error:
        return [_lost(folder, name, error)]
    return [] if size == record.bytes else [_wrong_size(folder / name, name, size, record)]


def _lost(folder: Path, name: str, error: OSError) -> Damage:
    """Return the damage of a file that cannot be read; raise a UserError if the reason may be the machine."""
    if error.errno not in _LOST:
        raise UserError(f"{folder / name}: cannot be read: {error.strerror or error}") from None
    return Damage(name, f"{folder / name}: missing or unreadable ({error.strerror})")


def _wrong_size(path: Path, name: str, size: int, record: FileRecord) -> Damage:
    return Damage(name, f"{path}: damaged, it has {size:,} bytes, {record.bytes:,} were written")


def wrong_sizes(folder: Path, manifest: Manifest) -> list[Damage]:
    """Return the files that are missing or have another size, without reading them.

    Raises:
        UserError: a file cannot be accessed.
    """
    return [damage for name, record in manifest.records.items() for damage in _damage_of_size(folder, name, record)]


def unlisted(folder: Path, manifest: Manifest) -> list[Damage]:
    """Return files that would be read as part of the checkpoint, but are not listed in its manifest."""
    if not manifest.files:
        return []
    present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [
        Damage(name, f"{folder / name}: not part of the checkpoint when it was written; move it away")
        for name in present
        if name not in manifest.files and any(fnmatchcase(name, pattern) for pattern in _READ)
    ]


def _require_long_enough(folder: Path) -> None:
    from ..dcp_metadata import read_metadata  # of format 1 only

    ends: dict[str, int] = {}
    for place in read_metadata(folder).storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            raise DamagedCheckpoint(f"{path}: " + (f"has {size:,} of {end:,} bytes" if size >= 0 else "missing"))
