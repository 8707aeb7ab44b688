"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), in the half-split layout of the
Hugging Face checkpoints: dimension i rotates with dimension i + D/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(position_ids_T: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Args:
        position_ids_T: [T] integer positions, restarting at every document.
        inverse_frequencies: [D/2] fp32 radians per position.

    Returns:
        Two [T, D] fp32 tensors; the angles are repeated for the second half.
    """
    angles = position_ids_T.float()[:, None] * inverse_frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the heads ``x_TND`` [T, N, D] by per-token angles; returns the dtype of ``x_TND``."""
    first, second = x_TND.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_TND * cos_TD[:, None].to(x_TND.dtype) + rotated * sin_TD[:, None].to(x_TND.dtype)
