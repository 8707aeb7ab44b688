"""The linear cross-entropy in Triton: the logits leave the chip once, as bf16 exponentials.

One kernel writes ``E = bf16(exp(z - c))`` of the fp32 logits ``z``, with the sums that the loss needs
(``triton_kernels.py``). Only the magnitude of the logits matters for the choice of ``c``: bf16 has fp32's range of
exponents, so ``c = 0`` works for rows whose largest logit is within ``SAFE_LOGIT`` of zero. Blocks with other rows are
computed again with ``c`` their largest logit. Their list is made on the device, so the host does not wait, and if it is
empty the second launch ends at once.

With ``S`` the sum of exponentials, ``v = slope * exp(c - lse)`` (0 where the target is ignored) scales a row of ``E``
to its gradient once the target's element is ``exp(z[y] - c) - exp(lse - c) / slope`` (formulas and ``slope``:
``rows.py``). The scale commutes with all products: ``dX = diag(v) (E @ W)``, ``dW += E^T @ (v X)``, ``db += E^T @ v``.

Sums are per tile and added in order, without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .rows import Gradients, Needs, Options, RowTerms, Targets, add_product, chunks, matmul_fp32, row_terms
from .triton_kernels import (
    Buffers,
    FarBlocks,
    Head,
    Tiles,
    launch_exponentials,
    target_products,
    tiles_for,
)

SAFE_LOGIT = 60.0
"""Maximum magnitude of a row's largest logit with ``c = 0``. ``exp(60) * V`` and its reciprocal, the row's scale, are
far inside fp32's and bf16's range (1e-38 to 3e38). So is a logit 27 below the largest of a row at -60."""

MIN_SLOPE = 1e-6
"""Minimum magnitude of ``slope``, which divides the target's element; realistic z-losses never come near it."""


def compute(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    options: Options,
    budget: int,
    needs: Needs,
    persistent: bool,
    weights_T: Tensor | None = None,
) -> Gradients:
    """Return losses and the gradients of their sum; see :func:`linear_cross_entropy` for shapes and options.

    The inputs are bf16.

    Args:
        budget: bytes for exponentials and row statistics. At least one block of rows is always processed.
        persistent: use the persistent kernel, which ``descriptor_refusal`` must allow.
    """
    hidden_TH, weight_VH = hidden_TH.contiguous(), weight_VH.contiguous()
    tiles = tiles_for(hidden_TH.device, persistent)
    num_tokens, num_rows = hidden_TH.shape[0], weight_VH.shape[0]
    losses, z_losses = torch.empty(2, num_tokens, dtype=torch.float32, device=hidden_TH.device)
    grad_hidden = torch.empty_like(hidden_TH) if needs.hidden else None
    grad_weight: Tensor | None = None
    grad_bias = torch.zeros(num_rows, 1, dtype=torch.float32, device=hidden_TH.device) if needs.bias else None
    head = Head(weight_VH, None if bias_V is None else bias_V.float().contiguous())
    on_device = torch.cuda.device(hidden_TH.device) if hidden_TH.is_cuda else contextlib.nullcontext()
    with on_device:
        for part in chunks(num_tokens, rows_per_chunk(budget, num_rows, tiles, any(needs)), tiles.rows):
            hidden = hidden_TH[part]
            targets = Targets.of(targets_T[part], num_rows, options, None if weights_T is None else weights_T[part])
            terms, exponentials, scale = _forward(hidden, head, targets, options, tiles, persistent, any(needs))
            losses[part], z_losses[part] = terms.losses_T, terms.z_losses_T
            if grad_hidden is not None:
                product = matmul_fp32(exponentials, weight_VH)
                if options.vocab_group is not None:
                    dist.all_reduce(product, group=options.vocab_group)
                torch.mul(product, scale[:, None], out=grad_hidden[part])
                del product
            if needs.weight:
                scaled = torch.mul(hidden, scale[:, None], out=torch.empty_like(hidden))
                grad_weight = add_product(grad_weight, exponentials.t(), scaled)
            if grad_bias is not None:
                grad_bias = add_product(grad_bias, exponentials.t(), scale[:, None].to(hidden.dtype))
            # Freed before the next chunk's are allocated.
            del exponentials
    if needs.weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
    return Gradients(losses, z_losses, grad_hidden, grad_weight, None if grad_bias is None else grad_bias[:, 0])


def rows_per_chunk(budget: int, num_rows: int, tiles: Tiles, need_gradient: bool) -> int:
    """Return how many tokens a chunk may have, a multiple of a tile's rows.

    Args:
        budget: bytes for exponentials and row statistics.
        num_rows: V of this rank.
        tiles: of the kernel.
        need_gradient: whether exponentials are stored.
    """
    statistics = 2 * 4 * _num_column_blocks(num_rows, tiles)
    rows = budget // (statistics + (2 * _padded(num_rows) if need_gradient else 0))
    return max(tiles.rows, rows // tiles.rows * tiles.rows)


def _forward(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    options: Options,
    tiles: Tiles,
    persistent: bool,
    need_gradient: bool,
) -> tuple[RowTerms, Tensor, Tensor]:
    """Return (terms of the rows, exponentials [T, V] bf16 with the target's element set, scale [T] fp32) of a chunk.

    The last two are empty if no gradient is needed.
    """
    num_tokens, num_rows = hidden.shape[0], head.weight_VH.shape[0]
    width = _padded(num_rows) if need_gradient else 0
    exponentials = torch.empty(num_tokens, width, dtype=torch.bfloat16, device=hidden.device)
    statistics = (_num_column_blocks(num_rows, tiles), num_tokens)
    sums, maxima = (torch.empty(statistics, dtype=torch.float32, device=hidden.device) for _ in range(2))
    buffers = Buffers(exponentials, sums, maxima)
    launch_exponentials(hidden, head, buffers, options, tiles, persistent)

    largest = maxima.amax(0)
    if options.vocab_group is not None:
        # A shift by this rank's own largest logit could be too far from that of the whole row.
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=options.vocab_group)
    far = far_blocks(largest, tiles.rows)
    launch_exponentials(hidden, head, buffers, options, tiles, persistent, far)

    target_logit = _target_logits(hidden, head, targets, options)
    terms = row_terms(far.shift_T + sums.sum(0).log_(), target_logit, targets, options)
    if not need_gradient:
        return terms, exponentials, target_logit.new_empty(0)
    exponentials = exponentials[:, :num_rows]
    scale = _set_target_elements(exponentials, target_logit, far.shift_T, terms, targets, options)
    return terms, exponentials, scale


def far_blocks(largest_T: Tensor, rows: int) -> FarBlocks:
    """Return the blocks of ``rows`` tokens in which a largest logit [T] is outside of ``SAFE_LOGIT``.

    The list is made without waiting for the device: the n-th far block is the first with n far blocks up to it.
    """
    num_tokens = largest_T.shape[0]
    is_far = F.pad(largest_T.abs() > SAFE_LOGIT, (0, -num_tokens % rows)).view(-1, rows).any(1)
    shift = torch.where(is_far[:, None].expand(-1, rows).reshape(-1)[:num_tokens], largest_T, 0.0)
    counts = is_far.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(1, len(counts) + 1, dtype=torch.int32, device=largest_T.device)
    return FarBlocks(shift, torch.searchsorted(counts, numbers, out_int32=True), counts[-1:])


def _target_logits(hidden: Tensor, head: Head, targets: Targets, options: Options) -> Tensor:
    """Return the [T] fp32 logits of the targets, 0 where another rank has the target."""
    logits = target_products(hidden, head.weight_VH, targets.index_T)
    if head.bias_V is not None:
        logits += head.bias_V[targets.index_T]
    if options.logit_scale != 1.0:
        logits *= options.logit_scale
    if options.logit_softcap is not None:
        logits = options.logit_softcap * torch.tanh(logits / options.logit_softcap)
    return torch.where(targets.owned_T > 0, logits, 0.0)


def _set_target_elements(
    exponentials: Tensor, target_logit: Tensor, shift: Tensor, terms: RowTerms, targets: Targets, options: Options
) -> Tensor:
    """Turn exponentials into gradients up to a factor of each row, and return the factors [T]."""
    slope = torch.where(terms.slope_T.abs() < MIN_SLOPE, MIN_SLOPE, terms.slope_T)
    element = torch.exp(target_logit - shift) - torch.exp(terms.log_sum_T - shift) / slope
    if options.logit_softcap is not None:
        element *= 1.0 - torch.square(target_logit / options.logit_softcap)
    index = targets.index_T[:, None]
    element = torch.where(targets.owned_T > 0, element, exponentials.gather(1, index)[:, 0])
    exponentials.scatter_(1, index, element[:, None].to(exponentials.dtype))
    return targets.weights_T * slope * torch.exp(shift - terms.log_sum_T) * options.logit_scale


def _num_column_blocks(num_rows: int, tiles: Tiles) -> int:
    return -(-num_rows // tiles.columns)


def _padded(num_rows: int) -> int:
    """Return the row stride of the exponentials: a multiple of 128 bytes, for cuBLAS's aligned kernels."""
    return -(-num_rows // 64) * 64
