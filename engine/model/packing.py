"""Describe the documents of a packed sequence, and the attention's plan for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from ...kernels.attention import VARIABLE_LENGTH, AttentionPlan, pad_offsets, plan_attention


class Packing(NamedTuple):
    """The documents of a packed sequence of T tokens."""

    position_ids: Tensor
    """[T] int64, position of each token in its document."""
    cu_seqlens: Tensor
    """[documents + 1] int32, first 0, last T. Documents without tokens may follow the others."""
    max_seqlen: int
    """Length of the longest document."""
    attention: AttentionPlan | None = None
    """The backend and its data; None for the backend that ``auto`` selects for the tensors' device."""


def plan_packing(
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    windows: Iterable[int | None],
    cu_seqlens_on_host: Tensor,
) -> Packing:
    """Return a packing whose attention does not wait for the device.

    Args:
        position_ids: [T] int64 on the device of the model.
        cu_seqlens: [documents + 1] int32 on the device of the model.
        max_seqlen: length of the longest document.
        backend: result of ``choose_attention``.
        windows: the windows of the model's layers.
        cu_seqlens_on_host: the same offsets in host memory, which the plan reads.
    """
    plan = plan_attention(backend, cu_seqlens_on_host, windows, position_ids.device)
    # Padding needs only the shape, which the host knows.
    offsets = pad_offsets(cu_seqlens) if backend in VARIABLE_LENGTH else cu_seqlens
    return Packing(position_ids, offsets, max_seqlen, plan)
