"""Linear cross-entropy in Triton: the logits leave the chip once, as bf16 exponentials.

One kernel multiplies hidden states and weight and writes ``E = bf16(exp(z - c))`` of the fp32 logits ``z``, with each
tile's row sums and row maxima and the target's logit, all fp32. Only the magnitude of the logits matters for the choice
of ``c``: bf16 has fp32's range of exponents, so ``c = 0`` works for rows whose largest logit is within ``SAFE_LOGIT``
of zero. Blocks with other rows are computed again with ``c`` their largest logit. A flag on the device selects them, so
the host does not wait, and if none is flagged the second launch ends at once.

With ``S`` the sum of exponentials, ``v = slope * exp(c - lse)`` (0 where the target is ignored) scales a row of ``E``
to its gradient once the target's element is ``exp(z[y] - c) - exp(lse - c) / slope`` (formulas and ``slope``:
``rows.py``). The scale commutes with all products: ``dX = diag(v) (E @ W)``, ``dW += E^T @ (v X)``, ``db += E^T @ v``.

Sums are per tile and added in order, without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .rows import Gradients, Needs, Options, RowTerms, Targets, add_product, chunks, matmul_fp32, row_terms

SAFE_LOGIT = 60.0
"""Maximum magnitude of a row's largest logit with ``c = 0``. ``exp(60) * V`` and its reciprocal, the row's scale, are
far inside fp32's and bf16's range (1e-38 to 3e38). So is a logit 27 below the largest of a row at -60."""

MIN_SLOPE = 1e-6
"""Minimum magnitude of ``slope``, which divides the target's element; realistic z-losses never come near it."""


class Tiles(NamedTuple):
    """Shape of the tile of logits that one program computes, and how Triton schedules it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Head(NamedTuple):
    """The output head, or this rank's rows of it."""

    weight_VH: Tensor
    """[V, H] bf16."""
    bias_V: Tensor | None
    """[V] fp32."""


INTERPRETER_TILES = Tiles(16, 32, 16, 4, 1)
HOPPER_TILES = Tiles(128, 256, 64, 8, 3)
OTHER_TILES = Tiles(128, 128, 32, 8, 3)


def compute(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    options: Options,
    budget: int,
    needs: Needs,
) -> Gradients:
    """Return losses and the gradients of their sum; see :func:`linear_cross_entropy` for shapes and options.

    The inputs are bf16.

    Args:
        budget: bytes for exponentials and row statistics. At least one block of rows is always processed.
    """
    tiles = _tiles_for(hidden_TH.device)
    hidden_TH, weight_VH = hidden_TH.contiguous(), weight_VH.contiguous()
    num_tokens, num_rows = hidden_TH.shape[0], weight_VH.shape[0]
    losses = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TH.device)
    grad_hidden = torch.empty_like(hidden_TH) if needs.hidden else None
    grad_weight: Tensor | None = None
    grad_bias = torch.zeros(num_rows, 1, dtype=torch.float32, device=hidden_TH.device) if needs.bias else None
    head = Head(weight_VH, None if bias_V is None else bias_V.float().contiguous())
    on_device = torch.cuda.device(hidden_TH.device) if hidden_TH.is_cuda else contextlib.nullcontext()
    with on_device:
        for part in chunks(num_tokens, _rows_per_chunk(budget, num_rows, tiles, any(needs)), tiles.rows):
            hidden = hidden_TH[part]
            targets = Targets.of(targets_T[part], num_rows, options)
            losses[part], exponentials, scale = _forward(hidden, head, targets, options, tiles, any(needs))
            if grad_hidden is not None:
                product = matmul_fp32(exponentials, weight_VH).mul_(scale[:, None])
                if options.vocab_group is not None:
                    dist.all_reduce(product, group=options.vocab_group)
                grad_hidden[part] = product
                del product
            if needs.weight:
                scaled = (hidden * scale[:, None]).to(hidden.dtype)
                grad_weight = add_product(grad_weight, exponentials.t(), scaled, budget)
            if grad_bias is not None:
                grad_bias = add_product(grad_bias, exponentials.t(), scale[:, None].to(hidden.dtype), budget)
            # Freed before the next chunk's are allocated.
            del exponentials
    if needs.weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
    return Gradients(losses, grad_hidden, grad_weight, None if grad_bias is None else grad_bias[:, 0])


def _forward(
    hidden: Tensor, head: Head, targets: Targets, options: Options, tiles: Tiles, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses [T], exponentials [T, V] bf16 with the target's element set, scale [T] fp32) of a chunk.

    The last two are empty if no gradient is needed.
    """
    num_tokens, num_rows = hidden.shape[0], head.weight_VH.shape[0]
    device = hidden.device
    width = _padded(num_rows) if need_gradient else 0
    exponentials = torch.empty(num_tokens, width, dtype=torch.bfloat16, device=device)
    sums = torch.empty(triton.cdiv(num_rows, tiles.columns), num_tokens, dtype=torch.float32, device=device)
    maxima = torch.empty_like(sums)
    target_logit = torch.zeros(num_tokens, dtype=torch.float32, device=device)
    owned = targets.owned_T > 0
    index = torch.where(owned, targets.index_T, -1)
    buffers = (exponentials, sums, maxima, target_logit)
    nothing = torch.zeros(num_tokens, dtype=torch.float32, device=device)
    _launch(hidden, head, index, nothing, nothing, buffers, options, tiles, second=False)

    largest = maxima.amax(0)
    if options.vocab_group is not None:
        # A shift by this rank's own largest logit could be too far from that of the whole row.
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=options.vocab_group)
    far = F.pad(largest.abs() > SAFE_LOGIT, (0, -num_tokens % tiles.rows)).view(-1, tiles.rows).any(1)
    shift = torch.where(far.repeat_interleave(tiles.rows)[:num_tokens], largest, 0.0)
    _launch(hidden, head, index, shift, far.to(torch.int32), buffers, options, tiles, second=True)

    log_sum = shift + sums.sum(0).log_()
    terms = row_terms(log_sum, target_logit, targets, options)
    if not need_gradient:
        return terms.losses_T, exponentials, nothing
    exponentials = exponentials[:, :num_rows]
    scale = _set_target_elements(exponentials, target_logit, shift, terms, targets, options)
    return terms.losses_T, exponentials, scale


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
    return targets.valid_T * slope * torch.exp(shift - terms.log_sum_T) * options.logit_scale


def _tiles_for(device: torch.device) -> Tiles:
    if device.type != "cuda":
        return INTERPRETER_TILES
    return HOPPER_TILES if torch.cuda.get_device_capability(device)[0] >= 9 else OTHER_TILES


def _padded(num_rows: int) -> int:
    """Return the row stride of the exponentials: a multiple of 128 bytes, for cuBLAS's aligned kernels."""
    return -(-num_rows // 64) * 64


def _rows_per_chunk(budget: int, num_rows: int, tiles: Tiles, need_gradient: bool) -> int:
    statistics = 2 * 4 * triton.cdiv(num_rows, tiles.columns)
    rows = budget // (statistics + (2 * _padded(num_rows) if need_gradient else 0))
    return max(tiles.rows, rows // tiles.rows * tiles.rows)


def _launch(
    hidden: Tensor,
    head: Head,
    index: Tensor,
    shift: Tensor,
    again: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
    options: Options,
    tiles: Tiles,
    second: bool,
) -> None:
    """Run the kernel over a chunk. Only the second launch reads ``shift`` and ``again`` (by block of rows)."""
    exponentials, sums, maxima, target_logit = buffers
    num_tokens, num_rows = hidden.shape[0], head.weight_VH.shape[0]
    grid = (triton.cdiv(num_tokens, tiles.rows) * triton.cdiv(num_rows, tiles.columns),)
    _exponentials_kernel[grid](
        hidden,
        head.weight_VH,
        hidden if head.bias_V is None else head.bias_V,  # not read without one
        index,
        shift,
        again,
        exponentials,
        sums,
        maxima,
        target_logit,
        num_tokens,
        num_rows,
        exponentials.stride(0),
        options.logit_softcap or 0.0,
        options.logit_scale,
        WIDTH=hidden.shape[1],
        BIAS=head.bias_V is not None,
        SCALE=options.logit_scale != 1.0,
        SOFTCAP=options.logit_softcap is not None,
        STORE=exponentials.shape[1] > 0,
        SECOND=second,
        # Triton's interpreter multiplies bf16 numbers as integers of their bits, and rounds to bf16 by truncation.
        INTERPRETED=not hidden.is_cuda,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


# With changing numbers of tokens, do not compile separate variants for multiples of 16 and for one.
@triton.jit(do_not_specialize=["num_tokens"])
def _exponentials_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    shift_ptr,
    again_ptr,
    exponentials_ptr,
    sums_ptr,
    maxima_ptr,
    target_logit_ptr,
    num_tokens,
    num_rows,
    exponentials_stride,
    cap,
    logit_scale,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    SECOND: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Compute one tile of logits.

    Programs that share columns of the weight run together: it is read from memory once, while the chunk's hidden states
    stay in the L2 cache.
    """
    num_row_blocks = tl.cdiv(num_tokens, ROWS)
    row_block = tl.program_id(0) % num_row_blocks
    column_block = tl.program_id(0) // num_row_blocks
    if SECOND:  # noqa: SIM102, decided when the kernel is compiled, unlike the next
        if tl.load(again_ptr + row_block) == 0:
            return
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = rows < num_tokens
    column_mask = columns < num_rows
    # Rows beyond the edge read the first row: their results are not stored, and the loop needs no mask for them.
    hidden_row = hidden_ptr + tl.where(row_mask, rows, 0)[:, None].to(tl.int64) * WIDTH
    weight_row = weight_ptr + tl.where(column_mask, columns, 0)[None, :].to(tl.int64) * WIDTH
    depth = tl.arange(0, DEPTH)
    logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        if WIDTH % DEPTH == 0:
            hidden = tl.load(hidden_row + (start + depth)[None, :])
            weight = tl.load(weight_row + (start + depth)[:, None])
        else:
            hidden = tl.load(hidden_row + (start + depth)[None, :], mask=(start + depth)[None, :] < WIDTH, other=0.0)
            weight = tl.load(weight_row + (start + depth)[:, None], mask=(start + depth)[:, None] < WIDTH, other=0.0)
        if INTERPRETED:
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        logits = tl.dot(hidden, weight, logits)
    if BIAS:
        logits += tl.load(bias_ptr + columns, mask=column_mask, other=0.0)[None, :]
    if SCALE:
        logits *= logit_scale
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * logits / cap) - 1.0
        logits = cap * tanh

    target = tl.load(index_ptr + rows, mask=row_mask, other=-1)
    hit = columns[None, :] == target[:, None]
    statistics = column_block.to(tl.int64) * num_tokens + rows
    if not SECOND:
        here = row_mask & (target >= column_block * COLUMNS) & (target < column_block * COLUMNS + COLUMNS)
        tl.store(target_logit_ptr + rows, tl.sum(tl.where(hit, logits, 0.0), axis=1), mask=here)
        maxima = tl.max(tl.where(column_mask[None, :], logits, float("-inf")), axis=1)
        tl.store(maxima_ptr + statistics, maxima, mask=row_mask)
        values = tl.exp(logits)
    else:
        values = tl.exp(logits - tl.load(shift_ptr + rows, mask=row_mask, other=0.0)[:, None])
    tl.store(sums_ptr + statistics, tl.sum(tl.where(column_mask[None, :], values, 0.0), axis=1), mask=row_mask)
    if STORE:
        if SOFTCAP:
            values *= 1.0 - tanh * tanh
        if INTERPRETED:
            # To nearest, halves to even, as a GPU does.
            bits = values.to(tl.int32, bitcast=True)
            values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        place = exponentials_ptr + rows[:, None].to(tl.int64) * exponentials_stride + columns[None, :]
        tl.store(place, values.to(tl.bfloat16), mask=row_mask[:, None] & column_mask[None, :])
