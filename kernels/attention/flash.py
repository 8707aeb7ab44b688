"""Flash attention over packed documents: the flash-attn package, and PyTorch's ``varlen_attn``.

``varlen_attn`` runs the FlashAttention-2 kernels that PyTorch is built with. :func:`use_implementation` replaces them
by those of FlashAttention-3 or -4.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

IMPLEMENTATIONS = {"fa3": "FA3", "fa4": "FA4"}
"""PyTorch's names of the implementations of ``varlen_attn``, by backend; its own has none."""


def use_implementation(name: str | None) -> None:
    """Make ``varlen_attn`` run ``FA3`` or ``FA4``; None for the kernels of PyTorch. This applies to the whole
    process.
    """
    if torch.nn.attention.current_flash_attention_impl() == name:
        return
    if name is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(name)


def pad_offsets(cu_seqlens: Tensor) -> Tensor:
    """Append empty documents until the number of documents is a power of two.

    Code compiled for the shape of ``cu_seqlens`` then sees only one shape per power of two. An empty document costs a
    launch of thread blocks that return at once. Not on ROCm, whose kernels have been wrong for them
    (Dao-AILab/flash-attention#2421).
    """
    if torch.version.hip:
        return cu_seqlens
    documents = cu_seqlens.numel() - 1
    missing = (1 << (documents - 1).bit_length()) - documents
    return torch.cat((cu_seqlens, cu_seqlens[-1:].expand(missing))) if missing else cu_seqlens


def with_one_head_size(
    kernel: Callable[..., Tensor],
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    *arguments: Any,
    softmax_scale: float | None = None,
    **options: Any,
) -> Tensor:
    """Run ``kernel``, which requires values of the size of queries and keys, and return [T, N, E].

    The smaller ones are padded with zeros. This is exact: zeros add nothing to a score, and the output's additional
    columns are removed. The price is the work for a larger head.
    """
    head_dim, value_head_dim = q_TND.shape[-1], v_TKE.shape[-1]
    if head_dim == value_head_dim:
        return kernel(q_TND, k_TKD, v_TKE, *arguments, softmax_scale=softmax_scale, **options)
    size = max(head_dim, value_head_dim)
    q, k, v = (F.pad(x, (0, size - x.shape[-1])) for x in (q_TND, k_TKD, v_TKE))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return kernel(q, k, v, *arguments, softmax_scale=scale, **options)[..., :value_head_dim]


def flash_attn_2(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Run the flash-attn package. Arguments as in ``attention``; documents without tokens are allowed."""
    from flash_attn import flash_attn_varlen_func

    # Not passed otherwise: old versions of the package do not have the argument.
    options = {} if softcap is None else {"softcap": softcap}
    length = kernel_length(max_seqlen)
    return flash_attn_varlen_func(
        q_TND,
        k_TKD,
        v_TKD,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=length,
        max_seqlen_k=length,
        softmax_scale=softmax_scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        **options,
    )


def varlen_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    shares_heads: bool | None = None,
) -> Tensor:
    """Run PyTorch's ``varlen_attn``. Arguments as in ``attention``; documents without tokens are allowed.

    Args:
        shares_heads: pass K key and value heads rather than N copies; None: as set by :func:`share_heads`.
    """
    options: dict[str, Any] = {}
    groups = q_TND.shape[1] // k_TKD.shape[1]
    if groups > 1:
        if not (_shares_heads if shares_heads is None else shares_heads):
            k_TKD, v_TKD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
        elif VARLEN_HAS_ENABLE_GQA:
            options["enable_gqa"] = True
    length = kernel_length(max_seqlen)
    output = varlen.varlen_attn(
        q_TND,
        k_TKD,
        v_TKD,
        cu_seqlens,
        cu_seqlens,
        length,
        length,
        scale=softmax_scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return cast(Tensor, output)  # it returns more only on request


@functools.cache
def package_parameters() -> frozenset[str]:
    """Return the names of the parameters of the flash-attn package's function; the package must be installed."""
    from flash_attn import flash_attn_varlen_func

    return frozenset(inspect.signature(flash_attn_varlen_func).parameters)


# Read when the module is imported, so that a compiled step sees a constant. Without this argument (PyTorch 2.11)
# varlen_attn does not look at the numbers of heads, but its documentation has only one.
VARLEN_HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
_shares_heads = VARLEN_HAS_ENABLE_GQA


def share_heads(works: bool) -> None:
    """Make ``varlen_attn`` take K key and value heads as they are, or copies for all N query heads.

    This applies to the whole process. The default is the first if PyTorch documents it.
    """
    global _shares_heads
    _shares_heads = works


def heads_are_shared() -> bool:
    """Return whether ``varlen_attn`` takes K key and value heads as they are."""
    return _shares_heads


def kernel_length(max_seqlen: int) -> int:
    """Return the length that the kernels are told for a longest document of ``max_seqlen`` tokens."""
    # The kernels need only an upper bound. For queries of length one they use a decoding path that counts the documents
    # and is wrong if some have no token (Dao-AILab/flash-attention#1537).
    return max(max_seqlen, 2)
