"""Compute the global gradient norm, and how to clip it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .local import local_part


@torch.no_grad()
def global_norm(
    parameters: Iterable[Tensor], counted: Iterable[Tensor] | None = None, loss: Tensor | None = None
) -> Tensor:
    """Return [] fp32: the L2 norm of the gradients of all parameters and ranks, without a host sync.

    Args:
        parameters: of this rank; DTensors if there are several ranks.
        counted: parameters without a copy in another pipeline stage; None for all.
        loss: [] this rank's part of the loss, if any. If it is not finite, the norm is NaN on all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = gradients if counted is None else [p.grad for p in counted if p.grad is not None]
    return _total_norm(own, loss, local_part(gradients[0]).device)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor | None:
    """Return [] fp32: the number to divide all gradients by, so that their norm is at most ``max_norm``.

    It is 1 for gradients that are not clipped. The optimizer divides, so that no pass over all gradients is needed.

    Args:
        norm: of :func:`global_norm`.
        max_norm: 0: no clipping, and None is returned.
    """
    return ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else None


def _total_norm(gradients: list[Tensor], loss: Tensor | None, device: torch.device) -> Tensor:
    """Return the norm over all ranks; every rank must call this, even without gradients: one all-reduced number, on
    ``device``.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_copies[_num_copies(gradient)].append(local_part(gradient))
    # Norms of bf16 gradients would be bf16.
    squares = [
        torch.stack(torch._foreach_norm(some, 2, torch.float32)).square().sum() / copies
        for copies, some in by_copies.items()
    ]
    total = torch.stack([torch.zeros((), device=device), *squares]).sum()
    if loss is not None:
        # Zero times a finite number changes no bit; times any other it is NaN, which the sum passes to all ranks.
        total = total + 0 * loss.to(total.device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.sqrt()


def _num_copies(gradient: Tensor) -> int:
    """Return the number of ranks that hold the same elements as this one."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(axis) for axis, place in enumerate(gradient.placements) if place.is_replicate())
