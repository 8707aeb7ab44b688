"""Clipping of the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    counted: Iterable[Tensor] | None = None,
    pipeline_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most ``max_norm`` (0: leave them), without a host sync.

    Args:
        parameters: of this rank.
        max_norm: the largest norm that is left.
        counted: those of which no other rank of ``pipeline_group`` has a copy; None for all.
        pipeline_group: the ranks with the other layers; None where there are none.

    Returns:
        [] fp32, the norm over all parameters and ranks before clipping.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = gradients if counted is None else [p.grad for p in counted if p.grad is not None]
    in_fp32 = all(gradient.dtype == torch.float32 for gradient in gradients)
    norm = nn.utils.get_total_norm(own) if in_fp32 else _total_norm(own)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline_group:
        square = norm.square()
        dist.all_reduce(square, group=pipeline_group)
        norm = square.sqrt()
    if max_norm > 0 and in_fp32:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    elif max_norm > 0:
        _scale(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """As ``get_total_norm``, which would round norms of bf16 gradients to bf16."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]))


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply by ``factor``, [] fp32: a bf16 factor would bend all gradients of a step by up to 0.4 %."""
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        # One element instead of none makes the product fp32; it is rounded as it is written.
        torch.mul(local, factor.reshape(1), out=local)
