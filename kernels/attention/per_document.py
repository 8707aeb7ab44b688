"""PyTorch's scaled dot-product attention, for each document, or for documents of one length as a batch.

Both run on every device. The first is the reference for the others and the default on CPUs. The second uses the fused
kernels without a mask, cuDNN's first, which are the fastest in PyTorch on Hopper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def per_document_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: Sequence[int],
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute one scaled dot-product attention per document of ``lengths`` tokens; the rest as in ``attention``."""
    # Heads first, as scaled_dot_product_attention expects; split returns views, so nothing is copied per document.
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_TND, k_TKD, v_TKD)), strict=True)
    outputs = [_causal_attention(q[None], k[None], v[None], softmax_scale, window)[0] for q, k, v in documents]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def batched_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    num_documents: int,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute one scaled dot-product attention over ``num_documents`` documents of T / num_documents tokens each.

    A window that is shorter than the documents needs a mask, which excludes the fastest kernels.
    """
    q, k, v = (x.unflatten(0, (num_documents, -1)).transpose(1, 2) for x in (q_TND, k_TKD, v_TKD))
    if q.device.type == "cuda":
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        with sdpa_kernel(order, set_priority=True):
            output = _causal_attention(q, k, v, softmax_scale, window)
    else:
        output = _causal_attention(q, k, v, softmax_scale, window)
    return output.transpose(1, 2).flatten(0, 1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, window: int | None) -> Tensor:
    """Map [B, N, S, D] queries and [B, K, S, D] keys and values to [B, N, S, D]."""
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
