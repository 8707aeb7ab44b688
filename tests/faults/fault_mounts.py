"""Small file systems of one's own: a disk that is full, a folder that is read-only. Root may mount them."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Use up the disk at ``folder`` but for ``left`` bytes, and all that is freed meanwhile, as one does who shares it:
    a run that removes a checkpoint has no more room for the next."""
    stopped = threading.Event()
    with (folder / _BALLAST).open("wb") as file:

        def fill() -> None:
            used = 0
            while not stopped.wait(0.002):
                disk = os.statvfs(folder)
                more = disk.f_bavail * disk.f_bsize - left
                if more > 0:
                    with contextlib.suppress(OSError):  # the run has taken it meanwhile
                        os.posix_fallocate(file.fileno(), used, more)
                        used += more

        thread = threading.Thread(target=fill)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            (folder / _BALLAST).unlink()


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
