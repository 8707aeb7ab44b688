"""Root-mean-square layer normalization (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize the last dimension of ``x + residual`` to unit root mean square and scale it by ``weight``.

    The sum is rounded to the dtype of ``x``, and the mean is computed in fp32. The normalized value is cast back before
    it is scaled, as in the published models.

    Args:
        x: [..., H], any floating dtype.
        weight: [H].
        eps: added to the mean square.
        residual: [..., H] of the dtype of ``x``, added first; None adds nothing.

    Returns:
        [..., H] in the dtype of ``x``; with a residual, that and the sum.
    """
    if residual is not None:
        x = residual + x
    x32 = x.float()
    normalized = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    scaled = weight * normalized.to(x.dtype)
    return scaled if residual is None else (scaled, x)
