"""Causal attention over packed documents: documents do not attend to each other.

One operation, :func:`attention`, with several backends. :func:`choose_attention_backend` chooses the backend of a run
once; :func:`plan_attention` prepares the data of a packing once. Shapes: T
tokens, N query heads, K key/value heads (N a multiple of K), D head size of queries and keys, E of values.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import flash
from .choice import BACKENDS, Choice, UnusableBackend, choose_attention_backend
from .flash import pad_offsets
from .per_document import batched_attention, per_document_attention
from .plan import (
    FLASH_ATTN,
    FLEX,
    PER_DOCUMENT,
    SDPA,
    VARIABLE_LENGTH,
    WITH_SINKS,
    WITH_SOFTCAP,
    AttentionPlan,
    plan_attention,
)

__all__ = [
    "BACKENDS",
    "PER_DOCUMENT",
    "VARIABLE_LENGTH",
    "AttentionPlan",
    "Choice",
    "UnusableBackend",
    "attention",
    "choose_attention_backend",
    "pad_offsets",
    "per_document_attention",
    "plan_attention",
]


def attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Compute causal self-attention inside each document.

    Args:
        q_TND: [T, N, D] queries.
        k_TKD: [T, K, D] keys, N a multiple of K (grouped-query attention).
        v_TKE: [T, K, E] values.
        cu_seqlens: [documents + 1] int32 on the device of ``q_TND``, first 0, last T: token offsets of the documents.
            Documents without tokens may follow the others.
        max_seqlen: length of the longest document.
        softmax_scale: factor on the scores; default 1 / sqrt(D).
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.
        softcap: replaces a scaled score ``s`` by ``softcap * tanh(s / softcap)``, as in Gemma 2.
        sinks: [N] a logit of each head that adds to the denominator of its softmax and has no value, as in gpt-oss.
        plan: the backend with its data for these documents. Without one it is made here from ``cu_seqlens``, for the
            backend of ``auto``; on a GPU some backends then wait for the device.

    Returns:
        [T, N, E] in the dtype of ``q_TND``.

    Raises:
        ValueError: the backend of ``plan`` does not support ``softcap`` or ``sinks``. ``choose_attention_backend`` does
            not return such a backend if it is told that the model has them.
    """
    if plan is None:
        plan = _plan_now(q_TND, v_TKE, cu_seqlens, window, softcap, sinks)
    tensors = q_TND, k_TKD, v_TKE
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "window": window}
    options |= _options_of(plan.backend, softcap, sinks)
    if plan.backend in VARIABLE_LENGTH:
        kernel = flash.flash_attn_2 if plan.backend == FLASH_ATTN else flash.varlen_attention
        return flash.with_one_head_size(kernel, *tensors, cu_seqlens, max_seqlen, **options)
    if plan.backend == SDPA:
        return batched_attention(*tensors, plan.num_documents, **options)
    if plan.backend == FLEX:
        from .flex import block_masked_attention

        assert plan.function is not None
        mask = plan.mask(options.pop("window"))
        return block_masked_attention(*tensors, mask, **options, function=plan.function)
    return (plan.function or per_document_attention)(*tensors, plan.lengths, **options)


def _options_of(backend: str, softcap: float | None, sinks: Tensor | None) -> dict[str, Any]:
    """Return the options that are in use, all of which ``backend`` supports."""
    options: dict[str, Any] = {}
    if softcap is not None:
        _require(backend, WITH_SOFTCAP, "softcap")
        options["softcap"] = softcap
    if sinks is not None:
        _require(backend, WITH_SINKS, "sinks")
        options["sinks"] = sinks
    return options


def _require(backend: str, supporting: tuple[str, ...], option: str) -> None:
    if backend not in supporting:
        raise ValueError(f"attention by {backend} has no {option}; plan it with {' or '.join(supporting)}")


def _plan_now(
    q_TND: Tensor,
    v_TKE: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionPlan:
    backend = choose_attention_backend(
        "auto",
        q_TND.device,
        q_TND.dtype,
        q_TND.shape[-1],
        windows=(window,),
        value_head_dim=v_TKE.shape[-1],
        softcap=softcap is not None,
        sinks=sinks is not None,
    ).backend
    if backend == PER_DOCUMENT:
        return AttentionPlan(backend, tuple(length for length in cu_seqlens.diff().tolist() if length))
    return plan_attention(backend, cu_seqlens, (window,), q_TND.device)
