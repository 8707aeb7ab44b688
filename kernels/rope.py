"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), in the half-split layout of the
Hugging Face checkpoints: dimension i rotates with dimension i + D/2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(position_ids_T: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles.

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


def apply_rope_to_pair(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Apply :func:`apply_rope` to queries and keys.

    Args:
        q_TND: [T, N, D] queries, D even.
        k_TKD: [T, K, D] keys of the same dtype.
        cos_TD: [T, D], from :func:`rope_cos_sin`.
        sin_TD: [T, D].
    """
    return apply_rope(q_TND, cos_TD, sin_TD), apply_rope(k_TKD, cos_TD, sin_TD)
