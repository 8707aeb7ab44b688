"""Describe the machine of a measurement: processor, memory, versions, commit. No names of machines or folders."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ... import __version__
from ...tools.preprocessing.workers.pool import usable_cores

_PACKAGES = ("fastokens", "tokenizers", "orjson", "numpy", "xxhash", "megatron-core")
_ROOT = Path(__file__).parents[2]


def machine_facts() -> dict[str, object]:
    """Return the facts for the results file."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "retemper": __version__,
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the checked-out commit, and whether files differ from it."""
    try:
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
