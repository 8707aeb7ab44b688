"""Attention over packed documents, written down one query at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    window: int | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[T, N, E]: for each query a softmax over the keys that its document, causality and the window leave it.

    A sink is one more key with a score of its own and a value of zero.
    """
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
            scores = (keys * q[start + place]).sum(2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[None]])
                values = torch.cat([values, torch.zeros_like(values[:1])])
            outputs.append((scores.softmax(0)[:, :, None] * values).sum(0))
        start += length
    return torch.stack(outputs)


def documented_varlen(q, k, v, cu_seqlens, max_seqlen, scale, left, right, softcap=0.0) -> Tensor:
    """What the flash-attn package documents for ``flash_attn_varlen_func``: query i of a document sees the keys
    i - left .. i + right, and -1 stands for no bound. Slow, for tests of how it is called."""
    offsets = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert q.shape[2] == k.shape[2] == v.shape[2]
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
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append((weights @ v_d).transpose(0, 1))
    return torch.cat(outputs)
