"""Attention of new tokens over keys and values that are kept from earlier ones, for generation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .per_document import WITHOUT_CUDNN, Options, explicit_attention, only_kernels


def cached_attention(
    q_BNLD: Tensor,
    k_BKSD: Tensor,
    v_BKSE: Tensor,
    visible_BLS: Tensor | None,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the attention of L new tokens of B sequences over S tokens each.

    Args:
        q_BNLD: [B, N, L, D] queries of the new tokens.
        k_BKSD: [B, K, S, D] keys of all tokens, N a multiple of K.
        v_BKSE: [B, K, S, E] their values.
        visible_BLS: [B, L, S] bool, whether a new token sees a token; None: each sees all.
        softmax_scale, softcap, sinks: as in :func:`~retemper.kernels.attention.attention`.

    Returns:
        [B, N, L, E] in the dtype of the queries.
    """
    mask = None if visible_BLS is None else visible_BLS[:, None]
    if softcap is not None or sinks is not None:
        options = Options(softmax_scale, None, softcap, sinks)
        return explicit_attention(q_BNLD, k_BKSD, v_BKSE, mask, options)
    num_heads, kv_heads = q_BNLD.shape[1], k_BKSD.shape[1]
    groups = num_heads // kv_heads
    # The queries of a group are rows of one matrix, so that its keys and values need no copies.
    rows = q_BNLD.unflatten(1, (kv_heads, groups)).flatten(2, 3)
    mask = mask if mask is None or groups == 1 else mask.repeat(1, 1, groups, 1)
    with only_kernels(WITHOUT_CUDNN, rows):  # cuDNN would plan every new length
        mixed = F.scaled_dot_product_attention(rows, k_BKSD, v_BKSE, mask, scale=softmax_scale)
    return mixed.unflatten(2, (groups, -1)).flatten(1, 2)
