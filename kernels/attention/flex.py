"""FlexAttention with a mask of documents, causality and window, made once per packing.

The mask's blocks are computed on the host from the lengths of the documents: nothing of size T x T is created, and
nothing waits for the device. Its shapes depend on T only, so packings of T tokens share one compiled kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .per_document import apply_sinks

BLOCK = 128
"""Tokens per side of a mask block, FlexAttention's own default."""


def make_block_mask(lengths: Sequence[int], window: int | None, device: torch.device) -> BlockMask:
    """Return the mask of packed documents of ``lengths`` tokens on ``device``.

    A token at r sees the tokens lowest(r)..r, and lowest is non-decreasing. So the rows of a block of queries together
    see one interval, from lowest of its first row to its last row. All of these rows see the keys from lowest of the
    last row to the block's first row.
    """
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    num_tokens = int(starts[-1])
    lowest_T = starts[:-1].repeat_interleave(torch.tensor(lengths))
    if window is not None:
        lowest_T = torch.maximum(lowest_T, torch.arange(num_tokens, dtype=torch.int32) - (window - 1))
    num_blocks = -(-num_tokens // BLOCK)
    block = torch.arange(num_blocks, dtype=torch.int32)
    last_rows = (block * BLOCK + BLOCK - 1).clamp(max=num_tokens - 1)
    first_seen = lowest_T[block * BLOCK] // BLOCK
    # The whole block of queries sees the keys from lowest of its last row up to the diagonal. A block that ends beyond
    # T has no such keys, as FlexAttention expects.
    first_whole = (lowest_T[last_rows] + BLOCK - 1) // BLOCK
    complete = (block + 1) * BLOCK <= num_tokens
    key = block[None, :]
    whole = (key >= first_whole[:, None]) & (key < block[:, None]) & complete[:, None]
    partial = (key >= first_seen[:, None]) & (key <= block[:, None]) & ~whole
    lowest_on_device = _to_device(lowest_T, device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= lowest_on_device[query])

    numbers, indices, whole_numbers, whole_indices = (
        _to_device(x, device) for x in (*_indices(partial), *_indices(whole))
    )
    return BlockMask.from_kv_blocks(
        numbers,
        indices,
        whole_numbers,
        whole_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(num_tokens, num_tokens),
    )


def block_masked_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    mask: BlockMask,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    function: Callable[..., Any] = flex_attention,
) -> Tensor:
    """Compute attention with ``mask``. ``function``: ``flex_attention``, compiled or not."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_TKD, v_TKE))
    options: dict[str, Any] = {"block_mask": mask, "scale": softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if softcap is not None:
        options["score_mod"] = _soft_cap(softcap)
    if sinks is None:
        output = function(q, k, v, **options)
    else:
        output, statistics = function(q, k, v, **options, return_aux=AuxRequest(lse=True))
        output = apply_sinks(output, statistics.lse, sinks)
    return output[0].transpose(0, 1)


def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([1, 1, Q] number, [1, 1, Q, K] ascending numbers) of the key blocks of each query block in [Q, K] bools.

    The numbers of the other key blocks follow.
    """
    order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
