"""Describe the machine of a measurement, and the versions that were measured. No names of machines or folders."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.system import total_memory, usable_cores

PACKAGES = (
    *("numpy", "torch", "triton", "transformers", "accelerate", "litgpt", "lightning", "liger-kernel"),
    *("cut-cross-entropy", "flash-attn", "megatron-core", "fastokens", "tokenizers", "orjson", "xxhash"),
)
"""Distributions whose versions are recorded if they are installed."""
_ROOT = Path(__file__).parents[1]


def describe_machine() -> dict[str, Any]:
    """Return processor, memory, load, system and versions. Call it before the measurement puts load on the machine."""
    versions = {"python": platform.python_version(), "retemper": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": versions,
    }


def describe_torch() -> dict[str, Any]:
    """Return the facts of :func:`describe_machine`, and what PyTorch uses: threads, GPU, CUDA.

    Call it in the measuring process: the query of a GPU's properties takes some of its memory.
    """
    import torch

    facts = {**describe_machine(), "threads": torch.get_num_threads()}
    facts["fp32_matmul_precision"] = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"], facts["gpus_seen"] = properties.name, torch.cuda.device_count()
        facts["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return facts


def one_line(machine: Mapping[str, Any]) -> str:
    """Return the description as text."""
    facts = {name: value for name, value in machine.items() if name != "versions"} | machine.get("versions", {})
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def commit() -> str:
    """Return the checked-out commit, marked if files differ from it."""
    try:
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
