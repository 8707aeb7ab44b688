"""Prepare the attention of one packing of documents, once on the host for every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import flash

FLASH_ATTN, FA3, FA4, VARLEN = "flash_attn", "fa3", "fa4", "varlen"
FLEX, SDPA, PER_DOCUMENT = "flex", "sdpa", "per_document"
VARIABLE_LENGTH = (FLASH_ATTN, FA3, FA4, VARLEN)
"""Backends that read ``cu_seqlens`` on the device, and need no data on the host."""
WITH_SOFTCAP = (FLASH_ATTN, FLEX, SDPA, PER_DOCUMENT)
"""Backends that can cap scores; ``varlen_attn`` has no argument for it."""
WITH_SINKS = (FLEX, SDPA, PER_DOCUMENT)
"""Backends that support attention sinks: those whose log-sum-exp of the scores has a gradient."""

_FLEX_GRAPHS = 64
"""Limit of the graphs of FlexAttention that is compiled alone."""


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
    masks: dict[int | None, Any] = field(default_factory=dict)
    """A ``BlockMask`` for each window that was planned or used."""
    make_mask: Callable[[int | None], Any] | None = None
    """Makes the ``BlockMask`` of a window; only for a backend that needs masks."""
    offsets: Tensor | None = None
    """[documents + 1] int32 in host memory; only for attention in blocks. Code that moves a module's arguments to
    the device does not see it."""
    function: Callable[..., Any] | None = None
    """The callable that runs the backend, if it is not the module's own."""

    def mask(self, window: int | None) -> Any:
        """Return the ``BlockMask`` of ``window``. The mask of a window that was not planned is made at its first use.

        This does not wait for the device. Code that is compiled should use planned windows, because a mask cannot be
        made inside a graph.
        """
        if window not in self.masks:
            assert self.make_mask is not None, f"attention backend {self.backend} has no masks"
            self.masks[window] = self.make_mask(window)
        return self.masks[window]


def plan_attention(
    backend: str,
    cu_seqlens: Tensor,
    windows: Iterable[int | None],
    device: torch.device,
    *,
    equal_lengths_backend: str | None = None,
    in_blocks: bool = False,
) -> AttentionPlan:
    """Return the plan of a packing.

    Args:
        backend: result of ``choose_attention_backend``.
        cu_seqlens: [documents + 1] offsets, in host memory: reading them from a GPU would wait for it.
        windows: the windows of the model's layers, None for full attention. Other windows work too, but what a backend
            prepares for them is then made when they are first used.
        device: where the attention runs.
        equal_lengths_backend: replaces ``backend`` if all documents have one length, and no window is shorter.
        in_blocks: the tokens are on several ranks, which compute :mod:`.blocks`.

    Raises:
        ValueError: ``sdpa`` with documents of different lengths.
    """
    windows = set(windows)
    if in_blocks:
        flash.use_implementation(flash.IMPLEMENTATIONS.get(backend))
        return AttentionPlan(backend, offsets=cu_seqlens)
    if equal_lengths_backend is not None and _is_batch(cu_seqlens, windows):
        backend = equal_lengths_backend
    if backend in VARIABLE_LENGTH:
        flash.use_implementation(flash.IMPLEMENTATIONS.get(backend))
        return AttentionPlan(backend)
    lengths = _lengths(cu_seqlens)
    if backend == SDPA:
        if len(set(lengths)) != 1:
            raise ValueError(f"attention backend sdpa is for documents of one length, not {sorted(set(lengths))}")
        return AttentionPlan(backend, num_documents=len(lengths))
    if backend == FLEX:
        from .flex import make_block_mask

        make_mask = functools.partial(torch.compiler.disable(make_block_mask), lengths, device=device)
        masks = {window: make_mask(window) for window in windows}
        return AttentionPlan(backend, masks=masks, make_mask=make_mask, function=_flex_function(device.type))
    assert backend == PER_DOCUMENT, backend
    return AttentionPlan(backend, lengths, function=_outside_graphs())


def _lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Return the lengths of the documents that have tokens."""
    return tuple(length for length in cu_seqlens.diff().tolist() if length)


def _is_batch(cu_seqlens: Tensor, windows: set[int | None]) -> bool:
    """Return whether all documents have one length, which no window limits."""
    first, *others = set(_lengths(cu_seqlens))
    return not others and all(window is None or window >= first for window in windows)


@functools.cache
def _flex_function(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation FlexAttention forms all scores: good enough for tests on a CPU.
    if device_type != "cuda":
        return flex_attention
    # One graph for each kind of layer, dtype and option. Beyond the limit PyTorch forms all scores as well, silently
    # unless the function has to be one graph.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FLEX_GRAPHS)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.cache
def _outside_graphs() -> Callable[..., Any]:
    from .per_document import per_document_attention

    # A graph would be recompiled for every packing's lengths.
    return torch.compiler.disable(per_document_attention)
