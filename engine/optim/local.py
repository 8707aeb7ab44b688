"""Return this rank's part of a tensor and how it is divided, and send small tensors to its device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds: all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_dim(placement: Placement) -> int | None:
    """Return the dimension that ``placement`` divides; None for copies. FSDP's strided shards count as well."""
    return None if placement.is_replicate() else placement.dim  # type: ignore[attr-defined]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor``, of the host, on ``device``, without a host sync."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
