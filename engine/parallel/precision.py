"""Decide ``training.precision: auto``: bf16 if the hardware computes it natively, else fp16 on GPUs and fp32 on CPUs.

Only decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config.settings import RunConfig
from .process_group import Ranks

_CPU_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm BF16"}
"""Flags in /proc/cpuinfo of bf16 matrix multiplication on x86 and Arm, and their usual names."""
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Precision:
    """The compute dtype of a run."""

    name: str
    """bf16, fp16 or fp32."""
    reason: str


def choose_precision(asked: str, ranks: Ranks, weight_dtype: str = "fp32") -> Precision:
    """Return the compute dtype for ``training.precision`` as ``asked``, the same on all ranks.

    With auto, all ranks must support bf16 natively for it to be chosen. All ranks must call this.

    Args:
        asked: a value of ``training.precision``.
        ranks: that train together.
        weight_dtype: of the weights; fp16 is chosen only with fp32.
    """
    native = native_bf16(ranks.device)
    if asked != "auto":
        slow = asked == "bf16" and native is None
        return Precision(asked, "as set" + (f", but {_without(ranks.device)} computes it slowly" if slow else ""))
    lacking = [rank for rank, name in enumerate(ranks.all_gather(native)) if name is None]
    if not lacking:
        return Precision("bf16", f"auto: {native}")
    which = "" if len(lacking) == ranks.world_size else f" of rank {lacking[0]}"
    name = _without_bf16(ranks.device, weight_dtype)
    return Precision(name, f"auto: {_without(ranks.device)}{which} has no native bf16")


def with_precision(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, Precision]:
    """Return ``config`` with ``training.precision`` decided, and why. All ranks must call this."""
    chosen = choose_precision(config.training.precision, ranks, config.training.weight_dtype)
    return with_named_precision(config, chosen.name), chosen


def with_precision_of(config: RunConfig, device: torch.device) -> RunConfig:
    """Return ``config`` with ``training.precision`` decided for ``device`` alone, without other ranks."""
    name = "bf16" if native_bf16(device) else _without_bf16(device, config.training.weight_dtype)
    return with_named_precision(config, name)


def with_named_precision(config: RunConfig, name: str) -> RunConfig:
    """Return ``config`` with ``name`` in place of ``training.precision: auto``."""
    if config.training.precision != "auto":
        return config
    return replace(config, training=replace(config.training, precision=name))  # type: ignore[arg-type]


def native_bf16(device: torch.device) -> str | None:
    """Return what computes bf16 on ``device`` at least as fast as fp32, or None.

    On a CPU without it, oneDNN converts in software: a step takes many times as long as in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_bf16_supported(including_emulation=False) else None
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    names = [name for flag, name in _CPU_FLAGS.items() if flag in flags]
    return f"this CPU has {' and '.join(names)}" if names else None


def _without_bf16(device: torch.device, weight_dtype: str) -> str:
    return "fp16" if device.type == "cuda" and weight_dtype == "fp32" else "fp32"


def _without(device: torch.device) -> str:
    return "the GPU" if device.type == "cuda" else "the CPU"
