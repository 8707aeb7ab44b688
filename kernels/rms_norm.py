"""Root-mean-square layer normalization (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

Average = Callable[[Tensor], Tensor]


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: None = None,
    *,
    weight_offset: float | None = None,
    average: Average | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    *,
    weight_offset: float | None = None,
    average: Average | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    *,
    weight_offset: float | None = None,
    average: Average | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    weight_offset: float | None = None,
    average: Average | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize the last dimension of ``x + residual`` to unit root mean square and scale it by ``weight``.

    The sum is rounded to the dtype of ``x``, and the mean is computed in fp32. The normalized value is cast back before
    it is scaled, as in most published models.

    Args:
        x: [..., H], any floating dtype.
        weight: [H].
        eps: added to the mean square.
        residual: [..., H] of the dtype of ``x``, added first; None adds nothing.
        weight_offset: added to the weight; the sum scales before the cast, in fp32, as in OLMo (0) and Gemma (1). None:
            the weight scales after the cast.
        average: averages the [..., 1] mean square over ranks that each hold a part of the last dimension.

    Returns:
        [..., H] in the dtype of ``x``; with a residual, that and the sum.
    """
    if residual is not None:
        x = residual + x
    x32 = x.float()
    mean_square = x32.square().mean(-1, keepdim=True)
    if average is not None:
        mean_square = average(mean_square)
    normalized = x32 * torch.rsqrt(mean_square + eps)
    if weight_offset is None:
        scaled = weight * normalized.to(x.dtype)
    else:
        scaled = ((weight.float() + weight_offset) * normalized).to(x.dtype)
    return scaled if residual is None else (scaled, x)
