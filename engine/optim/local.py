"""This rank's part of a tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``: all of one that is not shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
