"""Attention in blocks: merging of partial softmaxes, gradients of a block, and the masks that kernels are told."""

import math

import pytest
import torch

from retemper.kernels.attention import blocks, flash, flash_blocks
from retemper.kernels.attention.blocks import Block, BlockOptions, attend, attend_backward, merge
from retemper.kernels.attention.flash_blocks import mask_of

HEADS, KV_HEADS, SIZE, VALUE_SIZE = 4, 2, 8, 6


def tensors(queries, keys, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = (queries, HEADS, SIZE), (keys, KV_HEADS, SIZE), (keys, KV_HEADS, VALUE_SIZE), (queries, HEADS, VALUE_SIZE)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def visible(block, window):
    """Whether each query sees each key, pair by pair."""
    seen = torch.zeros(sum(block.query_lengths), sum(block.key_lengths), dtype=torch.bool)
    row = column = 0
    for length, num_keys in zip(block.query_lengths, block.key_lengths, strict=True):
        for i in range(length):
            for j in range(num_keys):
                seen[row + i, column + j] = 0 <= i + block.lag - j < (window or math.inf)
        row, column = row + length, column + num_keys
    return seen


def expected(q, k, v, seen, scale, softcap):
    """Output and log-sum-exp by definition."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("lnd,snd->nls", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("nls,sne->lne", scores.softmax(-1), v), scores.logsumexp(-1)


BLOCKS = {
    "documents": (Block(0, 0, (3, 1, 5), (3, 1, 5), 0), None),
    "documents with a window": (Block(0, 0, (3, 1, 5), (3, 1, 5), 0), 2),
    "rectangle": (Block(0, 0, (4,), (7,), 9), None),
    "rectangle with a window": (Block(0, 0, (4,), (7,), 7), 6),
}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("block", "window"), BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("limit", [1 << 24, 40])
def test_block_and_its_gradients(block, window, softcap, limit, monkeypatch):
    monkeypatch.setattr(blocks, "_MAX_SCORES", limit)  # in one piece, and in many
    q, k, v, upstream = tensors(sum(block.query_lengths), sum(block.key_lengths))
    for x in (q, k, v):
        x.requires_grad_()
    options = BlockOptions("per_document", 0.3, window, softcap)
    wanted, wanted_lse = expected(q, k, v, visible(block, window), 0.3, softcap)
    wanted.backward(upstream)
    out, lse = attend(q.detach(), k.detach(), v.detach(), block, options)
    torch.testing.assert_close(out, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse.detach(), rtol=1e-12, atol=1e-12)
    gradients = attend_backward(upstream, q.detach(), k.detach(), v.detach(), out, lse, block, options)
    for actual, x in zip(gradients, (q, k, v), strict=True):
        torch.testing.assert_close(actual, x.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_merged_parts_are_the_whole_softmax(dtype, tolerance):
    """Keys in three parts, one with scores so large that their exponentials overflow; a sink; rows without keys yet."""
    q, k, v, _ = tensors(5, 12)
    k[4:8] *= 300
    whole = Block(0, 0, (5,), (12,), 12)
    options = BlockOptions("per_document", 1.0)
    wanted, wanted_lse = expected(q, k, v, visible(whole, None), 1.0, None)
    out, lse = torch.zeros(5, HEADS, VALUE_SIZE, dtype=dtype), torch.full((HEADS, 5), -math.inf, dtype=dtype)
    for first in (0, 4, 8):
        rows = slice(first, first + 4)
        part = attend(*(x.to(dtype) for x in (q, k[rows], v[rows])), Block(0, 0, (5,), (4,), 12 - first), options)
        merge(out, lse, *part)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance * 100)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=tolerance, atol=tolerance)


def kernel_mask(block, window):
    """The mask of FlashAttention's kernels, by their documentation, for each part of a block."""
    left, right = mask_of(block, window)
    parts = []
    for length, num_keys in zip(block.query_lengths, block.key_lengths, strict=True):
        aligned = torch.arange(length)[:, None] + num_keys - length
        keys = torch.arange(num_keys)
        seen = torch.ones(length, num_keys, dtype=torch.bool)
        seen &= (keys >= aligned - left) if left >= 0 else True
        seen &= (keys <= aligned + right) if right >= 0 else True
        parts.append(seen)
    return torch.block_diag(*parts).bool()


@pytest.mark.parametrize("lag", [0, 3, 7, 9, 20])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 11, 24])
def test_masks_of_kernels(lag, window):
    if lag == 0:
        block = Block(0, 0, (4, 1, 3), (4, 1, 3), 0)
    else:
        num_keys = min(lag, 7)
        # Blocks have only keys that the first query sees, and only queries that see the last key.
        first = 0 if window is None else max(0, lag - window + 1)
        if first >= num_keys:
            return
        num_keys, lag = num_keys - first, lag - first
        length = 4 if window is None else min(4, num_keys - 1 + window - lag)
        if length < 1:
            return
        block = Block(0, 0, (length,), (num_keys,), lag)
    seen = visible(block, window)
    assert seen.any(1).all()
    assert torch.equal(kernel_mask(block, window), seen)


def kernel_weights(q, k, lse, offsets, mask, options):
    """Probabilities and scores of kernels whose mask is aligned at the end, by definition."""
    assert q.shape[1:] == k.shape[1:] or q.shape[1] % k.shape[1] == 0
    copies = q.shape[1] // k.shape[1]
    scores = torch.einsum("lnd,snd->nls", q, k.repeat_interleave(copies, dim=1)) * options.softmax_scale
    edges = zip(*(x.tolist() for x in offsets[:2]), strict=True)
    seen, before = torch.zeros(scores.shape[1:], dtype=torch.bool), next(edges)
    for after in edges:
        rows, columns = torch.arange(before[0], after[0]), torch.arange(before[1], after[1])
        aligned = rows[:, None] - before[0] + before[1] + len(columns) - len(rows)
        inside = torch.ones(len(rows), len(columns), dtype=torch.bool)
        inside &= (columns >= aligned - mask.left) if mask.left >= 0 else True
        inside &= (columns <= aligned + mask.right) if mask.right >= 0 else True
        seen[before[0] : after[0], before[1] : after[1]] = inside
        before = after
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse[..., None]).exp(), lse


def kernel_forward(q, k, v, offsets, mask, options):
    weights, lse = kernel_weights(q, k, None, offsets, mask, options)
    copies = q.shape[1] // k.shape[1]
    return torch.einsum("nls,sne->lne", weights, v.repeat_interleave(copies, dim=1)), lse


def kernel_backward(grad, q, k, v, out, lse, offsets, mask, options):
    assert grad.shape == out.shape == q.shape
    weights, _ = kernel_weights(q, k, lse, offsets, mask, options)
    copies = q.shape[1] // k.shape[1]
    many_k, many_v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    delta = (grad * out).sum(-1).T
    scores = weights * (torch.einsum("lne,sne->nls", grad, many_v) - delta[..., None]) * options.softmax_scale
    dk, dv = torch.einsum("nls,lnd->snd", scores, q), torch.einsum("nls,lne->sne", weights, grad)
    return torch.einsum("nls,snd->lnd", scores, many_k), *(x.unflatten(1, (-1, copies)).sum(2) for x in (dk, dv))


@pytest.mark.parametrize("shared", [True, False], ids=["shared heads", "copied heads"])
@pytest.mark.parametrize(("block", "window"), BLOCKS.values(), ids=BLOCKS)
def test_what_kernels_are_called_with(block, window, shared, monkeypatch):
    """Kernels by their documentation, in place of those of a GPU: values and keys of one size, offsets, masks."""
    monkeypatch.setattr(flash_blocks, "_aten_forward", kernel_forward)
    monkeypatch.setattr(flash_blocks, "_aten_backward", kernel_backward)
    monkeypatch.setattr(flash, "_shares_heads", shared)
    q, k, v, upstream = tensors(sum(block.query_lengths), sum(block.key_lengths))
    plain, kernels = (BlockOptions(backend, 0.3, window) for backend in ("per_document", "varlen"))
    wanted, actual = (attend(q, k, v, block, options) for options in (plain, kernels))
    lse = wanted[1] + 0.5  # over more keys than those of the block
    more = [attend_backward(upstream, q, k, v, wanted[0], lse, block, options) for options in (plain, kernels)]
    for ours, theirs in zip((*actual, *more[1]), (*wanted, *more[0]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6 if not shared else 1e-12, atol=1e-6)
