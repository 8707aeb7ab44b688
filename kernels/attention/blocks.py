"""Attention of some queries to some keys, and the log-sum-exp with which such partial results are merged.

Ring attention computes a softmax in pieces: each key block gives the output and the log-sum-exp of its own scores, and
:func:`merge` joins two of them. Every backend that returns a log-sum-exp can compute a block. The backward pass of a
block takes the output and the log-sum-exp over *all* keys, with which the probabilities of the block are exact.

Shapes: L queries of N heads, S keys of K heads (N a multiple of K), D head size of queries and keys, E of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import flash_blocks
from .block import BLOCK_BACKENDS, Block, BlockOptions, merge
from .plan import PER_DOCUMENT

__all__ = ["BLOCK_BACKENDS", "Block", "BlockOptions", "attend", "attend_backward", "merge"]

_MAX_SCORES = 1 << 24
"""Scores that the plain implementation forms at once: 64 MiB in fp32."""


def attend(q_LND: Tensor, k_SKD: Tensor, v_SKE: Tensor, block: Block, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """Compute a block from its own queries and keys.

    Returns:
        ([L, N, E] output, [N, L] log-sum-exp of the scores). The log-sum-exp is fp32, or fp64 for fp64 inputs.
    """
    if options.backend != PER_DOCUMENT:
        return flash_blocks.attend(q_LND, k_SKD, v_SKE, block, options)
    wide = torch.promote_types(q_LND.dtype, torch.float32)
    out_LNE = q_LND.new_empty((*q_LND.shape[:2], v_SKE.shape[-1]), dtype=wide)
    lse_NL = q_LND.new_empty((q_LND.shape[1], len(q_LND)), dtype=wide)
    for queries, keys, lag in _tiles(block, q_LND.shape[1], options.window):
        k, v = (x[keys].transpose(0, 1).to(wide) for x in (k_SKD, v_SKE))
        scores, _ = _scores(_by_group(q_LND[queries], len(k), wide), k, lag, options)
        sums = scores.logsumexp(-1, keepdim=True)
        weights = (scores - sums).exp_()
        out_LNE[queries] = _by_token((weights.flatten(1, 2) @ v).unflatten(1, weights.shape[1:3]))
        lse_NL[:, queries] = sums.squeeze(-1).flatten(0, 1)
    return out_LNE, lse_NL


def attend_backward(
    grad_LNE: Tensor,
    q_LND: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    out_LNE: Tensor,
    lse_NL: Tensor,
    block: Block,
    options: BlockOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the queries, keys and values of a block.

    By the equations of FlashAttention (Dao et al., 2022, https://arxiv.org/abs/2205.14135): probabilities are computed
    again from scores and log-sum-exp.

    Args:
        grad_LNE: gradient of the output over all keys.
        q_LND: queries of the block.
        k_SKD: keys of the block.
        v_SKE: values of the block.
        out_LNE: output over all keys.
        lse_NL: log-sum-exp over all keys, with the attention sink if there is one.
        block: which keys each query sees.
        options: as in the forward pass.

    Returns:
        ([L, N, D], [S, K, D], [S, K, E]).
    """
    if options.backend != PER_DOCUMENT:
        return flash_blocks.attend_backward(grad_LNE, q_LND, k_SKD, v_SKE, out_LNE, lse_NL, block, options)
    wide = torch.promote_types(q_LND.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q_LND, k_SKD, v_SKE))
    delta_LN = (grad_LNE.to(wide) * out_LNE.to(wide)).sum(-1)
    for queries, keys, lag in _tiles(block, q_LND.shape[1], options.window):
        k, v = (x[keys].transpose(0, 1).to(wide) for x in (k_SKD, v_SKE))
        groups = len(k)
        q, grad = (_by_group(x[queries], groups, wide) for x in (q_LND, grad_LNE))
        scores, slope = _scores(q, k, lag, options)
        weights = (scores - lse_NL[:, queries].unflatten(0, (groups, -1))[..., None]).exp_()
        delta = delta_LN[queries].T.unflatten(0, (groups, -1))[..., None]
        d_weights = (grad.flatten(1, 2) @ v.transpose(1, 2)).view_as(weights)
        d_scores = (weights * (d_weights - delta) * (slope * options.softmax_scale)).flatten(1, 2)
        dq[queries] += _by_token((d_scores @ k).view_as(q))
        dk[keys] += (d_scores.transpose(1, 2) @ q.flatten(1, 2)).transpose(0, 1)
        dv[keys] += (weights.flatten(1, 2).transpose(1, 2) @ grad.flatten(1, 2)).transpose(0, 1)
    return dq, dk, dv


def _scores(q_KGLD: Tensor, k_KSD: Tensor, lag: int, options: BlockOptions) -> tuple[Tensor, Tensor | float]:
    """Return ([K, G, L, S] scores, minus infinity where a query does not see a key; the derivative of the soft cap)."""
    scores = (q_KGLD.flatten(1, 2) @ k_KSD.transpose(1, 2)).unflatten(1, q_KGLD.shape[1:3]) * options.softmax_scale
    slope: Tensor | float = 1.0
    if options.softcap is not None:
        bounded = torch.tanh(scores / options.softcap)
        scores, slope = options.softcap * bounded, 1 - bounded.square()
    num_queries, num_keys = scores.shape[-2:]
    queries, keys = (torch.arange(number, device=scores.device) for number in (num_queries, num_keys))
    distance = queries[:, None] + lag - keys
    hidden = distance < 0
    if options.window is not None:
        hidden |= distance >= options.window
    return scores.masked_fill(hidden, -math.inf), slope


def _by_group(x_LND: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return [K, G, L, D]: the heads that share each key head."""
    return x_LND.transpose(0, 1).unflatten(0, (groups, -1)).to(dtype)


def _by_token(x_KGLD: Tensor) -> Tensor:
    """Return [L, N, D]."""
    return x_KGLD.flatten(0, 1).transpose(0, 1)


def _tiles(block: Block, num_heads: int, window: int | None) -> Iterator[tuple[slice, slice, int]]:
    """Divide a block into (rows of queries, rows of the keys that one of them sees, lag), with few scores each."""
    first, start = 0, 0
    for length, num_keys in zip(block.query_lengths, block.key_lengths, strict=True):
        size = max(1, _MAX_SCORES // (num_heads * num_keys))
        for low in range(0, length, size):
            high = min(low + size, length)
            lowest = 0 if window is None else max(0, low + block.lag - window + 1)
            stop = min(num_keys, high + block.lag)
            yield slice(first + low, first + high), slice(start + lowest, start + stop), low + block.lag - lowest
        first, start = first + length, start + num_keys
