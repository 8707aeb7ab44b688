"""Whether a checkpoint is what was written: every file of its size and hash, and no other beside them that is read."""

from __future__ import annotations

import errno
import heapq
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import UserError
from ...files.hashing import FileRecord, record_file
from ..damage import METADATA_FILE, TABLE_FILE, DamagedCheckpoint, file_inside
from .assets import ASSET_FOLDER
from .manifest import MANIFEST_FILE, Manifest, read_manifest

_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""What reading says of a file that the disk has lost. Anything else is the machine's trouble, not the checkpoint's."""
_READ = (TABLE_FILE, "*.safetensors", METADATA_FILE, "*.distcp", f"{ASSET_FOLDER}/*")
"""Files that a run or a converter could take for a part of the checkpoint, were they there."""


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written."""

    file: str
    """By its path in the checkpoint."""
    what: str
    """Path, and what is wrong: the beginning of a line."""


def find_damage(
    folder: Path,
    share: tuple[int, int] = (0, 1),
    only: Collection[str] | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> tuple[Manifest | None, list[Damage]]:
    """Check the checkpoint ``folder`` against its manifest, reading every byte.

    One of format 1 lists no files; of it is checked that the tensors' files are as long as its metadata says.

    Args:
        folder: of the checkpoint.
        share: (rank, number of ranks) that read it together: this one checks its share of the files, which are dealt
            out by size.
        only: these files, instead of a share.
        on_bytes: hears how many bytes each block that was read had.

    Returns:
        the manifest, where it can be read, and what is wrong.

    Raises:
        UserError: it is not this program's, or cannot be read.
    """
    try:
        if folder.is_dir() and not (folder / MANIFEST_FILE).is_file():
            raise DamagedCheckpoint(f"{folder}: {MANIFEST_FILE} is missing")
        manifest = read_manifest(folder)
        damage = [] if only is not None or share[0] else unlisted(folder, manifest)
        records = manifest.records
        if not records:
            _require_long_enough(folder)
        for name in only if only is not None else _deal(records, *share):
            if name in records:
                damage += _damage_of_file(folder, name, records[name], on_bytes)
        return manifest, damage
    except DamagedCheckpoint as error:
        return None, [Damage(MANIFEST_FILE, str(error).removesuffix("; use another checkpoint"))]


def require_undamaged(folder: Path, on_bytes: Callable[[int], object] = lambda count: None, workers: int = 1) -> None:
    """Read every byte of the checkpoint ``folder`` before anything is made of it.

    Args:
        folder: of the checkpoint.
        on_bytes: hears how many bytes each block that was read had, from any of the threads.
        workers: threads that share the files.

    Raises:
        UserError: naming the first file that is not what was written.
    """
    stop = threading.Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        on_bytes(count)

    with ThreadPoolExecutor(workers, "verify") as pool:
        futures = [pool.submit(find_damage, folder, (number, workers), None, advance) for number in range(workers)]
        try:
            damage = [found for future in futures for found in future.result()[1]]
        finally:
            stop.set()
    if damage:
        raise UserError(f"{damage[0].what}; use another checkpoint")


class _Stopped(Exception):
    """Nobody waits for the rest."""


def _deal(records: Mapping[str, FileRecord], rank: int, num_ranks: int) -> list[str]:
    """Files of ``rank``: the largest first, each to the rank that has the fewest bytes."""
    bytes_of = [(0, number) for number in range(num_ranks)]
    mine = []
    for name in sorted(records, key=lambda name: (-records[name].bytes, name)):
        size, number = heapq.heappop(bytes_of)
        heapq.heappush(bytes_of, (size + records[name].bytes, number))
        mine += [name] if number == rank else []
    return mine


def _damage_of_file(folder: Path, name: str, record: FileRecord, on_bytes: Callable[[int], object]) -> list[Damage]:
    try:
        path = file_inside(folder, name)
        size = path.stat().st_size
        if size != record.bytes:
            return [_wrong_size(path, name, size, record)]
        found = record_file(path, on_bytes)
    except DamagedCheckpoint as error:
        return [Damage(name, str(error))]
    except OSError as error:
        if error.errno not in _LOST:
            raise UserError(f"{folder / name}: cannot be read: {error.strerror or error}") from None
        return [Damage(name, f"{folder / name}: missing or unreadable ({error.strerror})")]
    if found.bytes != record.bytes:
        return [_wrong_size(path, name, found.bytes, record)]
    if found != record:
        return [Damage(name, f"{path}: damaged, its xxh3_128 is {found.xxh3_128}, {record.xxh3_128} was written")]
    return []


def _wrong_size(path: Path, name: str, size: int, record: FileRecord) -> Damage:
    return Damage(name, f"{path}: damaged, it has {size:,} bytes, {record.bytes:,} were written")


def wrong_sizes(folder: Path, manifest: Manifest) -> list[Damage]:
    """What can be seen without reading: files that are missing, or of another size.

    Raises:
        UserError: a file cannot be looked at.
    """
    damage = []
    for name, record in manifest.records.items():
        try:
            size = file_inside(folder, name).stat().st_size
        except DamagedCheckpoint as error:
            damage.append(Damage(name, str(error)))
        except OSError as error:
            if error.errno not in _LOST:
                raise UserError(f"{folder / name}: cannot be read: {error.strerror or error}") from None
            damage.append(Damage(name, f"{folder / name}: missing or unreadable ({error.strerror})"))
        else:
            if size != record.bytes:
                damage.append(_wrong_size(folder / name, name, size, record))
    return damage


def unlisted(folder: Path, manifest: Manifest) -> list[Damage]:
    """Files that would be read as part of the checkpoint, but are not."""
    if not manifest.files:
        return []
    present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [
        Damage(name, f"{folder / name}: not part of the checkpoint when it was written; move it away")
        for name in present
        if name not in manifest.files and any(fnmatchcase(name, pattern) for pattern in _READ)
    ]


def _require_long_enough(folder: Path) -> None:
    from ..conversion.dcp_metadata import read_metadata  # of format 1 only

    ends: dict[str, int] = {}
    for place in read_metadata(folder).storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            raise DamagedCheckpoint(f"{path}: " + (f"has {size:,} of {end:,} bytes" if size >= 0 else "missing"))
