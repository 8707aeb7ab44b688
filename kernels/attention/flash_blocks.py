"""Attention blocks by the kernels of FlashAttention, of PyTorch or of the flash-attn package.

Both return the log-sum-exp, and both compute the gradients of a block from the log-sum-exp over all keys. Their masks
are aligned at the end: with L queries and S keys of a document, query i sees the keys from ``i + S - L - left`` to
``i + S - L + right``.

Not measured yet: these paths need a GPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import flash
from .block import Block, BlockOptions
from .plan import FLASH_ATTN


class Mask(NamedTuple):
    """The keys that a query sees next to the aligned one."""

    left: int
    """Keys before it; -1 for all."""
    right: int
    """Keys after it; -1 for all."""

    @property
    def causal(self) -> bool:
        """Whether it is the causal mask without a window, which has kernels of its own."""
        return self == (-1, 0)


class _Offsets(NamedTuple):
    queries: Tensor
    """[parts + 1] int32 on the device."""
    keys: Tensor
    max_queries: int
    max_keys: int


def attend(q_LND: Tensor, k_SKD: Tensor, v_SKE: Tensor, block: Block, options: BlockOptions) -> tuple[Tensor, Tensor]:
    """See :func:`retemper.kernels.attention.blocks.attend`."""
    value_dim = v_SKE.shape[-1]
    q, k, v = _kernel_inputs(q_LND, k_SKD, v_SKE, options)
    run = _package_forward if options.backend == FLASH_ATTN else _aten_forward
    out, lse_NL = run(q, k, v, _offsets(block, q.device), mask_of(block, options.window), options)
    return out[..., :value_dim], lse_NL


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
    """See :func:`retemper.kernels.attention.blocks.attend_backward`."""
    (kv_heads, head_dim), value_dim = k_SKD.shape[1:], v_SKE.shape[-1]
    q, k, v = _kernel_inputs(q_LND, k_SKD, v_SKE, options)
    grad, out = (_padded(x.to(q.dtype), q.shape[-1]).contiguous() for x in (grad_LNE, out_LNE))
    run = _package_backward if options.backend == FLASH_ATTN else _aten_backward
    setting = _offsets(block, q.device), mask_of(block, options.window), options
    dq, dk, dv = run(grad, q, k, v, out, lse_NL.contiguous(), *setting)
    if dk.shape[1] != kv_heads:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :value_dim]


def mask_of(block: Block, window: int | None) -> Mask:
    """Return the kernels' form of the mask of a block.

    In :class:`Block`, query i sees the keys after ``i + lag - window``. So ``left = S - L - lag + window - 1``.
    """
    if block.lag == 0:
        return Mask(-1 if window is None else window - 1, 0)
    (length,), (num_keys,) = block.query_lengths, block.key_lengths
    if window is None or length - 1 + block.lag < window:
        return Mask(-1, -1)
    return Mask(num_keys - length - block.lag + window - 1, -1)


def _kernel_inputs(q: Tensor, k: Tensor, v: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of one head size, with a copy of each key head for all queries if necessary."""
    size = max(q.shape[-1], v.shape[-1])
    q, k, v = (_padded(x, size) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and options.backend != FLASH_ATTN and not flash.heads_are_shared():
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return q, k, v


def _padded(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


@functools.lru_cache(maxsize=256)
def _offsets(block: Block, device: torch.device) -> _Offsets:
    def on_device(lengths: Sequence[int]) -> Tensor:
        on_host = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host

    both = block.query_lengths, block.key_lengths
    queries, keys = (on_device(lengths) for lengths in both)
    max_queries, max_keys = (flash.kernel_length(max(lengths)) for lengths in both)
    return _Offsets(queries, keys, max_queries, max_keys)


def _aten_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: _Offsets, mask: Mask, options: BlockOptions
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *offsets,
        0.0,
        mask.causal,
        False,
        scale=options.softmax_scale,
        window_size_left=mask.left,
        window_size_right=mask.right,
    )
    return out, lse


def _aten_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: _Offsets,
    mask: Mask,
    options: BlockOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    # The two tensors are the state of dropout, which is not used. varlen_attn passes the same.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        *offsets,
        0.0,
        mask.causal,
        *state,
        scale=options.softmax_scale,
        window_size_left=mask.left,
        window_size_right=mask.right,
    )


def _package_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: _Offsets, mask: Mask, options: BlockOptions
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward

    out, lse, *_ = _wrapped_flash_attn_varlen_forward(q, k, v, *offsets, **_package_options(mask, options))
    return out, lse


def _package_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: _Offsets,
    mask: Mask,
    options: BlockOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    named = _package_options(mask, options)
    _wrapped_flash_attn_varlen_backward(grad, q, k, v, out, lse, dq, dk, dv, *offsets, **named, deterministic=False)
    return dq, dk, dv


def _package_options(mask: Mask, options: BlockOptions) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": options.softmax_scale,
        "causal": mask.causal,
        "window_size_left": mask.left,
        "window_size_right": mask.right,
        "softcap": options.softcap or 0.0,
        "alibi_slopes": None,
    }
