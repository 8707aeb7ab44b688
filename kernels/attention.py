"""Causal attention over packed documents: a document never sees its neighbour.

One operation with two implementations: flash-attn's variable-length kernel where the package and a GPU are there, and
PyTorch's scaled dot-product attention per document everywhere else. Shapes: T tokens, N query heads, K key/value heads
(N a multiple of K), D head size.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH_ATTN = "flash-attn"
PER_DOCUMENT = "PyTorch SDPA per document"


def attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention inside each document.

    Args:
        q_TND: [T, N, D] queries.
        k_TKD: [T, K, D] keys, N a multiple of K (grouped-query attention).
        v_TKD: [T, K, D] values.
        cu_seqlens: [documents + 1] int32, first 0, last T: token offsets of the documents.
        max_seqlen: length of the longest document.
        softmax_scale: factor on the scores; default 1 / sqrt(D).
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.

    Returns:
        [T, N, D] in the dtype of ``q_TND``.
    """
    if attention_backend(q_TND.device.type, q_TND.dtype) == FLASH_ATTN:
        return _flash_attention(q_TND, k_TKD, v_TKD, cu_seqlens, max_seqlen, softmax_scale, window)
    return per_document_attention(q_TND, k_TKD, v_TKD, cu_seqlens, softmax_scale=softmax_scale, window=window)


@functools.cache
def attention_backend(device_type: str, dtype: torch.dtype) -> str:
    """The implementation that :func:`attention` uses for tensors of this kind: ``FLASH_ATTN`` or ``PER_DOCUMENT``."""
    can_flash = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return FLASH_ATTN if can_flash and importlib.util.find_spec("flash_attn") is not None else PER_DOCUMENT


def per_document_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The reference: one scaled dot-product attention per document. Arguments as in :func:`attention`."""
    offsets = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(offsets)]
    # Heads first, as scaled_dot_product_attention wants them; split gives views, so nothing is copied per document.
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_TND, k_TKD, v_TKD)), strict=True)
    outputs = [_document_attention(q, k, v, softmax_scale, window) for q, k, v in documents]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _document_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, window: int | None) -> Tensor:
    length = q.shape[1]
    mask = None
    if window is not None and window < length:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    output = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        mask,
        is_causal=mask is None,
        scale=softmax_scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return output[0]


def _flash_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None,
    window: int | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_TND,
        k_TKD,
        v_TKD,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=softmax_scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
