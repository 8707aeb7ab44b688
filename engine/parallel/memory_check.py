"""Compare the minimum memory of a run's weights, gradients and optimizer states with the available memory.

A run is refused before anything is allocated, and only if arithmetic alone excludes it: a machine that runs out of
memory kills processes, often other ones than the run. Activations and buffers are not included; ``tools/plan.py``
estimates them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..config.settings import RunConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.dtypes import DTYPES
from ..system import total_memory
from . import adapter as adapters
from . import trainable
from .layout import plan_layout

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def require_memory(config: RunConfig, architecture: Architecture, device: torch.device, world_size: int) -> None:
    """Refuse a model whose weights, gradients and optimizer states are larger than the memory of its ranks.

    Raises:
        UserError: with both sides of the arithmetic.
    """
    sharing = _sharing_ranks(config, world_size)
    training, adapter = config.training, config.adapter
    total, trained = architecture.num_parameters, trainable.count(architecture, training, adapter)
    weight_bytes = DTYPES[training.weight_dtype].itemsize
    per_weight: float = weight_bytes
    per_trained = weight_bytes + trainable.state_bytes(architecture, config) / trained + training.average_bytes
    if adapter.kind is not None:  # weights of the base have the dtype of the computation, or few bits
        per_weight, per_trained = adapters.base_bytes(architecture, config) / total, weight_bytes + per_trained
    needed = int(total * per_weight + trained * per_trained) // sharing
    available = _available(config, device, world_size)
    if needed > available:
        raise UserError(
            f"model: ({total:,} parameters x {per_weight:.4g} bytes + {trained:,} trainable ones x {per_trained:.4g} "
            f"bytes of gradients and optimizer states) / {sharing} ranks that share them = {needed / 1e9:,.1f} GB for "
            "each rank, which has "
            f"{available / 1e9:,.1f} GB; use more ranks or a smaller model, see tools/plan.py"
        )


def require_memory_for_weights(
    config: RunConfig, architecture: Architecture, device: torch.device, world_size: int
) -> None:
    """Refuse a model whose weights alone are larger than the memory of its ranks, for work without training.

    Raises:
        UserError: with both sides of the arithmetic.
    """
    sharing, itemsize = _sharing_ranks(config, world_size), DTYPES[config.training.weight_dtype].itemsize
    needed = architecture.num_parameters * itemsize // sharing
    available = _available(config, device, world_size)
    if needed > available:
        fewer = ", training.weight_dtype bf16" if itemsize > 2 else ""
        raise UserError(
            f"model.initialize_from: {architecture.num_parameters:,} parameters x {itemsize} bytes / {sharing} ranks "
            f"that share them = {needed / 1e9:,.1f} GB for each rank, which has {available / 1e9:,.1f} GB; use more "
            f"ranks{fewer} or a smaller model"
        )


def _sharing_ranks(config: RunConfig, world_size: int) -> int:
    """Return the number of ranks that have one copy of the model together."""
    layout = plan_layout(config.parallel, world_size)
    return layout.world_size // layout.replicate


def _available(config: RunConfig, device: torch.device, world_size: int) -> int:
    """Return the bytes of memory that a rank has where the weights are."""
    on_host = device.type == "cpu" or bool(config.parallel.cpu_offload)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_host and world_size > 1 else 1
    return device_memory(torch.device("cpu") if on_host else device) // ranks_here


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of ``device``: of the GPU, or of the host within the limit of this process's control
    group.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [total_memory()]
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():  # else "max"
            limits.append(int(text))
    return min(limits)
