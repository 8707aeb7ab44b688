"""Attention over packed documents, written down one query at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, scale: float | None
) -> Tensor:
    """[T, N, D]: for each query a softmax over the keys that its document, causality and the window leave it."""
    outputs = []
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    start = 0
    for length in lengths:
        for place in range(length):
            first = start if window is None else max(start, start + place - window + 1)
            last = start + place + 1
            # Query head n reads key head n // group.
            keys = k[first:last].repeat_interleave(group, dim=1)
            values = v[first:last].repeat_interleave(group, dim=1)
            weights = torch.softmax((keys * q[start + place]).sum(2) * scale, dim=0)
            outputs.append((weights[:, :, None] * values).sum(0))
        start += length
    return torch.stack(outputs)


def documented_varlen(q, k, v, cu_seqlens, max_seqlen, scale, left, right) -> Tensor:
    """What the flash-attn package documents for ``flash_attn_varlen_func``: query i of a document sees the keys
    i - left .. i + right, and -1 stands for no bound. Slow, for tests of how it is called."""
    offsets = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    outputs = []
    for start, stop in itertools.pairwise(offsets):
        assert stop - start <= max_seqlen
        q_d, k_d, v_d = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        k_d, v_d = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (k_d, v_d))
        offset = torch.arange(stop - start)[None, :] - torch.arange(stop - start)[:, None]
        visible = (offset >= -left) if left != -1 else torch.ones_like(offset, dtype=torch.bool)
        if right != -1:
            visible = visible & (offset <= right)
        scores = (q_d @ k_d.transpose(1, 2)) * (q.shape[2] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append((weights @ v_d).transpose(0, 1))
    return torch.cat(outputs)
