"""Root-mean-square layer normalization (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension of ``x`` to unit root mean square and scale it by ``weight``.

    The mean is taken in fp32 and the normalized value is cast back before it is scaled, as the published models do.

    Args:
        x: [..., H], any floating dtype.
        weight: [H].
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of ``x``.
    """
    x32 = x.float()
    normalized = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)
