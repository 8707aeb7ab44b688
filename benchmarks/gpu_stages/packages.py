"""Bring the Python packages that a rented GPU machine lacks: download them as wheels here, install them there offline.

``wheels.json`` lists what is carried, ``machine_packages.txt`` what the machine is assumed to have.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from retemper.engine.errors import UserError

PYTHON_VERSION = "3.12"
"""Of the machine."""
_PLATFORMS = ("2_28", "2_27", "2_17", "2014", "1")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Wheel:
    """A package that is carried to the machine."""

    name: str
    version: str
    megabytes: float
    why: str


def carried() -> list[Wheel]:
    """Return the packages of ``wheels.json``."""
    return [Wheel(**entry) for entry in json.loads((_HERE / "wheels.json").read_text(encoding="utf-8"))]


def machine_packages() -> set[str]:
    """Return the normalized names of the packages that the machine is assumed to have."""
    lines = (_HERE / "machine_packages.txt").read_text(encoding="utf-8").splitlines()
    return {normalized(line) for line in lines if line and not line.startswith("#")}


def normalized(name: str) -> str:
    """Return the name of a distribution as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing() -> list[str]:
    """Return the carried packages that are not installed for this Python."""
    return [wheel.name for wheel in carried() if not _installed(wheel.name)]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def download(folder: Path) -> str:
    """Download the wheels to ``folder``; return a line about them.

    Raises:
        UserError: pip found one of them not to be available.
    """
    platforms = [f"--platform=manylinux{'' if name.isdigit() else '_'}{name}_x86_64" for name in _PLATFORMS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON_VERSION}", *platforms]
    names = [f"{wheel.name}=={wheel.version}" for wheel in carried()]
    done = subprocess.run([*pip, "--dest", str(folder), *names], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--download-wheels {folder}: pip: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    files = wheel_files(folder)
    return f"{len(files)} wheels, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB, in {folder}"


def wheel_files(folder: Path) -> list[Path]:
    """Return the wheels in a folder."""
    return sorted(folder.glob("*.whl"))


def install_command(files: Sequence[Path], target: Path) -> list[str]:
    """Return the command that installs wheels without a network, into a folder for ``PYTHONPATH``."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    return [*pip, "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(target), *map(str, files)]
