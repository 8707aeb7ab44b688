"""Clip the global gradient norm."""

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
def clip_grad_norm(
    parameters: Iterable[Tensor], max_norm: float, counted: Iterable[Tensor] | None = None, loss: Tensor | None = None
) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most ``max_norm`` (0: no scaling), without a host sync.

    Args:
        parameters: of this rank; DTensors if there are several ranks.
        max_norm: the maximum norm after scaling.
        counted: parameters without a copy in another pipeline stage; None for all.
        loss: [] this rank's part of the loss, if any. If it is not finite, the norm is NaN on all ranks.

    Returns:
        [] fp32, the norm over all parameters and ranks before clipping.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = gradients if counted is None else [p.grad for p in counted if p.grad is not None]
    norm = _total_norm(own, loss, local_part(gradients[0]).device)
    if max_norm > 0:
        _scale(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


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


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply by ``factor``, [] fp32: a bf16 factor would change all gradients of a step by up to 0.4 %."""
    local = [local_part(gradient) for gradient in gradients]
    in_fp32 = [gradient for gradient in local if gradient.dtype == torch.float32]
    if in_fp32:
        torch._foreach_mul_(in_fp32, factor)
    for gradient in local:
        if gradient.dtype != torch.float32:
            # One element instead of zero dimensions makes the product fp32; it is rounded when it is written.
            torch.mul(gradient, factor.reshape(1), out=gradient)
