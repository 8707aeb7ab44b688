"""Small file systems of one's own: a disk that is full, a folder that is read-only. Root may mount them."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

DISK_BYTES = 24 << 20
_BALLAST = "ballast"


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode == 0:
            unmount(Path(folder))
    return done.returncode == 0


def mount_disk(folder: Path) -> None:
    """A tmpfs of :data:`DISK_BYTES` at ``folder``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Use up the disk at ``folder`` but for ``left`` bytes."""
    disk = os.statvfs(folder)
    with (folder / _BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_bsize - left))


def empty(folder: Path) -> None:
    """Take back :func:`fill`."""
    (folder / _BALLAST).unlink(missing_ok=True)


def make_read_only(folder: Path) -> None:
    """Nothing can be written below ``folder``, by anybody."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def unmount(folder: Path) -> None:
    """Take back one mount at ``folder``, if there is one."""
    if os.path.ismount(folder) or _is_bound(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _is_bound(folder: Path) -> bool:
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return any(line.split()[1] == str(folder) for line in mounts)
