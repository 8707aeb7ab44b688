"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864).

Two layouts exist: half-split, as in most Hugging Face checkpoints (dimension i rotates with i + R/2), and interleaved
(dimension 2i rotates with 2i + 1). The first R dimensions of a head rotate, the others are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(
    position_ids_T: Tensor, inverse_frequencies: Tensor, interleaved: bool = False, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles.

    Args:
        position_ids_T: [T] integer positions, restarting at every document.
        inverse_frequencies: [R/2] fp32 radians per position; or [T, R/2], if tokens differ in them.
        interleaved: the layout.
        factor: of cosine and sine.

    Returns:
        Two [T, R] fp32 tensors, with the angle of each dimension.
    """
    angles = position_ids_T.float()[:, None] * inverse_frequencies
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def apply_rope(x_TND: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the heads ``x_TND`` [T, N, D] by per-token angles; returns the dtype of ``x_TND``."""
    width = cos_TR.shape[-1]
    turned, kept = (x_TND, None) if width == x_TND.shape[-1] else (x_TND[..., :width], x_TND[..., width:])
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        quarter = torch.cat((-second, first), dim=-1)
    rotated = turned * cos_TR[:, None].to(x_TND.dtype) + quarter * sin_TR[:, None].to(x_TND.dtype)
    return rotated if kept is None else torch.cat((rotated, kept), dim=-1)


def apply_rope_to_pair(
    q_TND: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply :func:`apply_rope` to queries and keys.

    Args:
        q_TND: [T, N, D] queries, D even.
        k_TKD: [T, K, D] keys of the same dtype.
        cos_TR: [T, R], from :func:`rope_cos_sin`.
        sin_TR: [T, R].
        interleaved: the layout, as in :func:`rope_cos_sin`.
    """
    return apply_rope(q_TND, cos_TR, sin_TR, interleaved), apply_rope(k_TKD, cos_TR, sin_TR, interleaved)
