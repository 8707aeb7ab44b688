"""Prepare the attention of one packing of documents, once on the host for every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import flash

FLASH_ATTN, FA3, FA4, VARLEN = "flash_attn", "fa3", "fa4", "varlen"
FLEX, SDPA, PER_DOCUMENT = "flex", "sdpa", "per_document"
VARIABLE_LENGTH = (FLASH_ATTN, FA3, FA4, VARLEN)
"""Backends that read ``cu_seqlens`` on the device, and need no data on the host."""


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A backend, and its data about a packing on the host.

    Not a tuple, so that code which moves or casts the tensors among a module's arguments (FSDP, torch.compile's guards)
    sees one opaque value.
    """

    backend: str
    lengths: tuple[int, ...] = ()
    """Tokens of each document, all positive; only for backends that need them."""
    num_documents: int = 0
    """Number of documents; only for a backend with documents of one length."""
    masks: Mapping[int | None, Any] = field(default_factory=dict)
    """A ``BlockMask`` for each window among the layers."""
    function: Callable[..., Any] | None = None
    """The callable that runs the backend, if it is not the module's own."""


def plan_attention(
    backend: str, cu_seqlens: Tensor, windows: Iterable[int | None], device: torch.device
) -> AttentionPlan:
    """Return the plan of a packing.

    Args:
        backend: result of ``choose_attention_backend``.
        cu_seqlens: [documents + 1] offsets, in host memory: reading them from a GPU would wait for it.
        windows: the windows of the model's layers, None for full attention.
        device: where the attention runs.

    Raises:
        ValueError: ``sdpa`` with documents of different lengths.
    """
    if backend in VARIABLE_LENGTH:
        flash.use_implementation({FA3: "FA3", FA4: "FA4"}.get(backend))
        return AttentionPlan(backend)
    lengths = tuple(length for length in cu_seqlens.diff().tolist() if length)
    if backend == SDPA:
        if len(set(lengths)) != 1:
            raise ValueError(f"attention backend sdpa is for documents of one length, not {sorted(set(lengths))}")
        return AttentionPlan(backend, num_documents=len(lengths))
    if backend == FLEX:
        from .flex import make_block_mask

        masks = {window: make_block_mask(lengths, window, device) for window in set(windows)}
        return AttentionPlan(backend, masks=masks, function=_flex_function(device.type))
    assert backend == PER_DOCUMENT, backend
    return AttentionPlan(backend, lengths, function=_outside_graphs())


@functools.cache
def _flex_function(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation FlexAttention forms all scores: good enough for tests on a CPU.
    if device_type != "cuda":
        return flex_attention
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _outside_graphs() -> Callable[..., Any]:
    from .per_document import per_document_attention

    # A graph would be recompiled for every packing's lengths.
    return torch.compiler.disable(per_document_attention)
