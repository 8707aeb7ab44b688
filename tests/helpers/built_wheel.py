"""A wheel and a source distribution, built from a copy of the repository's files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def copy_of_the_repository(folder: Path) -> Path:
    """Copy all files but the ignored ones: a build writes into the folder of its source, and takes what it finds."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(source: Path, kind: str, output: Path) -> Path:
    """Build ``kind``, "wheel" or "sdist", from the folder ``source``, without a network."""
    output.mkdir(exist_ok=True)
    # Isolated: with the source on sys.path, its kernels/ would hide the package of that name.
    command = [sys.executable, "-I", "-c", _BUILD, f"build_{kind}", str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.splitlines()[-1]
