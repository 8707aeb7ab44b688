"""Return the part of a parameter that a rank computes with."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def local_copy(weight: Tensor) -> Tensor:
    """Return this rank's weight as a plain tensor.

    With tensor parallelism, ranks with copies of it see different tokens, heads or features, so its gradient is the sum
    of theirs. Of a weight that is split over ranks, each has the gradient of its part.
    """
    if not isinstance(weight, DTensor):
        return weight
    summed = [Partial() if placement.is_replicate() else placement for placement in weight.placements]
    return weight.to_local(grad_placements=summed)
