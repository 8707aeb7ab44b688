"""PyTorch's scaled dot-product attention, for each document, or for documents of one length as a batch.

Both run on every device. The first is the reference for the others and the default on CPUs. The second uses the fused
kernels without a mask, cuDNN's first where :func:`use_cudnn` allows them, which are the fastest in PyTorch on Hopper.

PyTorch's function has neither a soft cap nor sinks. With one of them the scores of a document are formed in fp32, which
takes memory for [N, S, S] of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_CUDNN = SDPBackend.CUDNN_ATTENTION
_uses_cudnn = False


def use_cudnn(works: bool) -> None:
    """Make documents of one length use cuDNN or not. This applies to the whole process; the default is not."""
    global _uses_cudnn
    _uses_cudnn = works


class Options(NamedTuple):
    """The keyword arguments of ``attention`` that change its result."""

    softmax_scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def per_document_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    lengths: Sequence[int],
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute one scaled dot-product attention per document of ``lengths`` tokens; the rest as in ``attention``."""
    options = Options(softmax_scale, window, softcap, sinks)
    # Heads first, as scaled_dot_product_attention expects; split returns views, so nothing is copied per document.
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_TND, k_TKD, v_TKE)), strict=True)
    outputs = [_causal_attention(q[None], k[None], v[None], options)[0] for q, k, v in documents]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def batched_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    num_documents: int,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    only_cudnn: bool = False,
) -> Tensor:
    """Compute one scaled dot-product attention over ``num_documents`` documents of T / num_documents tokens each.

    A window that is shorter than the documents needs a mask, which excludes the fastest kernels. With ``only_cudnn``
    no other kernel replaces cuDNN's.
    """
    options = Options(softmax_scale, window, softcap, sinks)
    q, k, v = (x.unflatten(0, (num_documents, -1)).transpose(1, 2) for x in (q_TND, k_TKD, v_TKE))
    output = _causal_attention(q, k, v, options, [_CUDNN] if only_cudnn else _batch_kernels())
    return output.transpose(1, 2).flatten(0, 1)


def apply_sinks(output: Tensor, log_sum: Tensor, sinks: Tensor) -> Tensor:
    """Return attention with sinks from attention without them.

    A sink is one more logit in the denominator of a row's softmax, which so grows from ``exp(lse)`` to
    ``exp(lse) + exp(sink)``.

    Args:
        output: [..., N, S, E].
        log_sum: [..., N, S] fp32 log-sum-exp of the scores. The gradient of the scores depends on its gradient.
        sinks: [N].
    """
    share = torch.sigmoid(log_sum - sinks.to(log_sum.dtype)[:, None])
    return (output * share[..., None]).to(output.dtype)


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, kernels: Sequence[SDPBackend] = WITHOUT_CUDNN
) -> Tensor:
    """Map [B, N, S, D] queries, [B, K, S, D] keys and [B, K, S, E] values to [B, N, S, E].

    Args:
        kernels: those to try on a GPU, in this order. By default without cuDNN's, which plan each new length.
    """
    if options.softcap is not None or options.sinks is not None:
        return explicit_attention(q, k, v, _visible(q.shape[2], options.window, q.device), options)
    length = q.shape[2]
    windowed = options.window is not None and options.window < length
    mask = _visible(length, options.window, q.device) if windowed else None
    # The gradients of cuDNN's kernels with a mask are not numbers for some lengths (pytorch/pytorch#196678).
    with only_kernels(kernels if mask is None else WITHOUT_CUDNN, q):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=options.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _batch_kernels() -> list[SDPBackend]:
    return [_CUDNN, *WITHOUT_CUDNN] if _uses_cudnn else WITHOUT_CUDNN


def only_kernels(kernels: Sequence[SDPBackend], q: Tensor) -> AbstractContextManager[None]:
    """Return a context in which PyTorch uses only these kernels on a GPU; there is no choice elsewhere."""
    return sdpa_kernel(list(kernels), set_priority=True) if on_gpu(q) else nullcontext()


def on_gpu(x: Tensor) -> bool:
    """Return whether ``x`` is on a GPU."""
    return x.device.type == "cuda"


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, options: Options) -> Tensor:
    """Map [B, N, L, D] queries, [B, K, S, D] keys and [B, K, S, E] values to [B, N, L, E], with soft cap and sinks.

    Scores and sums are fp32, or float64 for float64 inputs.

    Args:
        visible: [L, S] or [B, 1, L, S] bool, whether a query sees a key; None: each sees all. It includes the window.
    """
    dtype, num_heads, kv_heads, length = q.dtype, q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    # The queries of a group are rows of one matrix, so that its keys and values need no copies.
    q = (q * scale).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores = (q @ k.transpose(-1, -2)).view(-1, num_heads, length, k.shape[2])
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).view(-1, kv_heads, num_heads // kv_heads * length, k.shape[2])
    output = (weights @ v).view(-1, num_heads, length, v.shape[-1])
    if options.sinks is not None:
        output = apply_sinks(output, scores.logsumexp(-1), options.sinks)
    return output.to(dtype)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return [S, S] bool: whether a query (row) sees a key of its document."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
