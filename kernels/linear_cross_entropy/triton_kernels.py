"""The Triton kernels of the linear cross-entropy, and how they are launched.

``_exponentials_kernel`` multiplies hidden states and weight and writes ``E = bf16(exp(z - c))`` of the fp32 logits
``z``, with each tile's row sums and row maxima in fp32. ``_target_products_kernel`` computes the product that is the
target's logit. ``triton_loss.py`` makes losses and gradients of their results.

The first kernel has two ways to read its operands:

- through tensor descriptors (TMA, NVIDIA compute capability 9.0 and 10.x), as a persistent kernel: one program per
  multiprocessor works through many tiles, and the loads of the next tile are in flight during the exponentials of this
  one. A descriptor needs rows that begin at a multiple of 16 bytes.
- through pointers, with one program per tile, for everything else.

Each element of an output is written by one program, without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Options


class Tiles(NamedTuple):
    """Shape of the tile of logits that one program computes, and how Triton schedules it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    parts: int
    """Number of column ranges, 1 or 4, in which a tile's exponentials are computed. More need fewer registers."""


class Head(NamedTuple):
    """The output head, or this rank's rows of it."""

    weight_VH: Tensor
    """[V, H] bf16."""
    bias_V: Tensor | None
    """[V] fp32."""


class Buffers(NamedTuple):
    """The results of ``_exponentials_kernel`` for a chunk of T tokens."""

    exponentials_TV: Tensor
    """[T, padded V] bf16; [T, 0] if they are not needed."""
    sums_CT: Tensor
    """[C, T] fp32 sums of exponentials over each tile's columns, C tiles in a row."""
    maxima_CT: Tensor
    """[C, T] fp32 largest logits of each tile's columns."""


class FarBlocks(NamedTuple):
    """The blocks of rows whose exponentials need a shift. All are on the device, so the host does not wait."""

    shift_T: Tensor
    """[T] fp32, subtracted from a row's logits."""
    blocks: Tensor
    """Int32 numbers of the blocks; the values after the first ``num_blocks`` are not read."""
    num_blocks: Tensor
    """[1] int32."""


POINTER_TILES = Tiles(128, 256, 64, 8, 3, 4)
"""For compute capability 9.0 and 10.x, which have 227 KB of shared memory: 147 KB here."""
DESCRIPTOR_TILES = Tiles(128, 256, 64, 8, 4, 4)
"""Four stages of 48 KB, and 16 KB for a part of the exponentials on its way to memory."""
SMALL_TILES = Tiles(128, 128, 32, 8, 3, 1)
"""For all other GPUs: 48 KB of shared memory."""
INTERPRETER_TILES = Tiles(16, 32, 16, 4, 1, 4)
INTERPRETER_PROGRAMS = 3

GROUP_BYTES = 16 * 1024**2
"""Hidden states of the tiles that run together with all columns. They stay in the L2 cache while the weight is read
once for each group."""


DESCRIPTOR_CAPABILITIES = ((9, 0), (10, 0), (10, 1), (10, 3))
"""NVIDIA's compute capabilities with tensor descriptors and 227 KB of shared memory. Consumer GPUs (12) have 99 KB."""


def tiles_for(device: torch.device, persistent: bool) -> Tiles:
    """Return the tiles for a device."""
    if device.type != "cuda":
        return INTERPRETER_TILES
    if not has_descriptors(device):
        return SMALL_TILES
    return DESCRIPTOR_TILES if persistent else POINTER_TILES


def has_descriptors(device: torch.device) -> bool:
    """Return whether the device has tensor descriptors and the memory for large tiles; the interpreter has."""
    if device.type != "cuda":
        return True
    is_nvidia = torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) in DESCRIPTOR_CAPABILITIES


def descriptor_refusal(hidden_TH: Tensor, weight_VH: Tensor) -> str | None:
    """Return why the persistent kernel cannot read these matrices; None if it can."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return f"triton {triton.__version__} has no tensor descriptors; install triton 3.4 or newer"
    if not has_descriptors(hidden_TH.device):
        return "it needs an NVIDIA GPU of compute capability 9.0 or 10.x"
    if hidden_TH.shape[1] % 8:
        return f"rows of {hidden_TH.shape[1]} bf16 numbers do not begin at multiples of 16 bytes"
    if hidden_TH.data_ptr() % 16 or weight_VH.data_ptr() % 16:
        return "the hidden states or the weight do not begin at a multiple of 16 bytes"
    return None


def launch_exponentials(
    hidden_TH: Tensor,
    head: Head,
    buffers: Buffers,
    options: Options,
    tiles: Tiles,
    persistent: bool,
    far: FarBlocks | None = None,
) -> None:
    """Compute the exponentials and statistics of a chunk; with ``far``, only of those blocks of rows, with a shift.

    The launch for far blocks has one program per multiprocessor. If there are no such blocks, all end at once.
    """
    num_tiles = triton.cdiv(hidden_TH.shape[0], tiles.rows) * buffers.sums_CT.shape[0]
    one_tile_each = far is None and not persistent
    programs = num_tiles if one_tile_each else min(num_tiles, _num_multiprocessors(hidden_TH.device))
    arguments = exponentials_arguments(hidden_TH, head, buffers, options, tiles, persistent, far)
    _exponentials_kernel[(programs,)](**arguments)


def exponentials_arguments(
    hidden_TH: Tensor,
    head: Head,
    buffers: Buffers,
    options: Options,
    tiles: Tiles,
    persistent: bool,
    far: FarBlocks | None,
) -> dict[str, Any]:
    """Return the arguments of ``_exponentials_kernel``; tensors without values will do to compile it."""
    num_tokens, width = hidden_TH.shape
    num_rows = head.weight_VH.shape[0]
    operands: tuple[Any, Any, Any] = hidden_TH, head.weight_VH, buffers.exponentials_TV
    store = buffers.exponentials_TV.shape[1] > 0
    if persistent:
        operands = _descriptors(hidden_TH, head.weight_VH, buffers.exponentials_TV, tiles)
    unread = buffers.sums_CT
    return {
        **dict(zip(("hidden", "weight", "exponentials"), operands, strict=True)),
        "bias_ptr": unread if head.bias_V is None else head.bias_V,
        "shift_ptr": unread if far is None else far.shift_T,
        "far_ptr": unread if far is None else far.blocks,
        "count_ptr": unread if far is None else far.num_blocks,
        "sums_ptr": buffers.sums_CT,
        "maxima_ptr": buffers.maxima_CT,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "exponentials_stride": buffers.exponentials_TV.stride(0),
        "group": max(8, GROUP_BYTES // (2 * width * tiles.rows)),
        "cap": options.logit_softcap or 0.0,
        "logit_scale": float(options.logit_scale),
        "WIDTH": width,
        "BIAS": head.bias_V is not None,
        "SCALE": options.logit_scale != 1.0,
        "SOFTCAP": options.logit_softcap is not None,
        "STORE": store,
        "FAR": far is not None,
        "DESCRIPTORS": persistent,
        # Triton's interpreter multiplies bf16 numbers as integers of their bits, and rounds to bf16 by truncation.
        "INTERPRETED": hidden_TH.device.type == "cpu",
        "PTX": hidden_TH.device.type != "cpu" and torch.version.hip is None,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "PARTS": tiles.parts,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def target_products(hidden_TH: Tensor, weight_VH: Tensor, index_T: Tensor) -> Tensor:
    """Return the [T] fp32 products of each hidden state with row ``index_T`` of the weight."""
    products = torch.empty(hidden_TH.shape[0], dtype=torch.float32, device=hidden_TH.device)
    _target_products_kernel[(hidden_TH.shape[0],)](**target_arguments(hidden_TH, weight_VH, index_T, products))
    return products


def target_arguments(hidden_TH: Tensor, weight_VH: Tensor, index_T: Tensor, products_T: Tensor) -> dict[str, Any]:
    """Return the arguments of ``_target_products_kernel``."""
    width = hidden_TH.shape[1]
    return {
        "hidden_ptr": hidden_TH,
        "weight_ptr": weight_VH,
        "index_ptr": index_T,
        "products_ptr": products_T,
        "WIDTH": width,
        "BLOCK": min(1024, triton.next_power_of_2(width)),
        "num_warps": 4,
    }


def _descriptors(hidden_TH: Tensor, weight_VH: Tensor, exponentials_TV: Tensor, tiles: Tiles) -> tuple[Any, Any, Any]:
    """Return the descriptors of the operands; accesses beyond their edges read zeros and write nothing."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    hidden = TensorDescriptor.from_tensor(hidden_TH, [tiles.rows, tiles.depth])
    weight = TensorDescriptor.from_tensor(weight_VH, [tiles.columns, tiles.depth])
    if exponentials_TV.shape[1] == 0:
        return hidden, weight, hidden  # not written
    written = exponentials_TV[:, : weight_VH.shape[0]]
    return hidden, weight, TensorDescriptor.from_tensor(written, [tiles.rows, tiles.columns // tiles.parts])


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


# With changing numbers of tokens, do not compile separate variants for multiples of 16 and for one.
@triton.jit(do_not_specialize=["num_tokens", "group"])
def _exponentials_kernel(
    hidden,  # descriptors if DESCRIPTORS, else pointers
    weight,
    exponentials,
    bias_ptr,
    shift_ptr,
    far_ptr,
    count_ptr,
    sums_ptr,
    maxima_ptr,
    num_tokens,
    num_rows,
    exponentials_stride,
    group,
    cap,
    logit_scale,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    FAR: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute every ``num_programs``-th tile of logits."""
    num_row_blocks = tl.load(count_ptr) if FAR else tl.cdiv(num_tokens, ROWS)
    num_column_blocks = tl.cdiv(num_rows, COLUMNS)
    num_tiles = num_row_blocks * num_column_blocks
    PART: tl.constexpr = COLUMNS // PARTS
    # Flattened with the loop over DEPTH, so that the loads of the next tile begin before this one is finished.
    for tile in tl.range(
        _bound(tl.program_id(0), INTERPRETED),
        _bound(num_tiles, INTERPRETED),
        _bound(tl.num_programs(0), INTERPRETED),
        flatten=DESCRIPTORS,
    ):
        row_block, column_block = _place(tile, num_row_blocks, num_column_blocks, group)
        if FAR:
            row_block = tl.load(far_ptr + row_block)
        first_row, first_column = row_block * ROWS, column_block * COLUMNS
        rows = first_row + tl.arange(0, ROWS)
        row_mask = rows < num_tokens
        if DESCRIPTORS:
            product = _product_of_descriptors(
                hidden, weight, first_row, first_column, WIDTH, INTERPRETED, ROWS, COLUMNS, DEPTH
            )
        else:
            columns = first_column + tl.arange(0, COLUMNS)
            # Rows beyond the edge read the first row: their results are not stored, and the loop needs no mask.
            hidden_row = hidden + tl.where(row_mask, rows, 0)[:, None].to(tl.int64) * WIDTH
            weight_row = weight + tl.where(columns < num_rows, columns, 0)[None, :].to(tl.int64) * WIDTH
            product = _product_of_rows(hidden_row, weight_row, WIDTH, INTERPRETED, ROWS, COLUMNS, DEPTH)
        parts = _split(product, PARTS)
        sums = tl.zeros((ROWS,), dtype=tl.float32)
        maxima = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            first = first_column + part * PART
            columns = first + tl.arange(0, PART)
            logits, slope = _logits(
                parts[part], columns, num_rows, bias_ptr, cap, logit_scale, BIAS, SCALE, SOFTCAP, PTX
            )
            if FAR:
                values = _exp(logits - tl.load(shift_ptr + rows, mask=row_mask, other=0.0)[:, None], PTX)
            else:
                maxima = tl.maximum(maxima, tl.max(logits, axis=1))
                values = _exp(logits, PTX)
            sums += tl.sum(values, axis=1)
            if STORE:
                if SOFTCAP:
                    values *= slope
                values = _to_bf16(values, INTERPRETED)
                if DESCRIPTORS:
                    exponentials.store([first_row, first], values)
                else:
                    place = exponentials + rows[:, None].to(tl.int64) * exponentials_stride + columns[None, :]
                    tl.store(place, values, mask=row_mask[:, None] & (columns < num_rows)[None, :])
        statistics = column_block.to(tl.int64) * num_tokens + rows
        tl.store(sums_ptr + statistics, sums, mask=row_mask)
        if not FAR:
            tl.store(maxima_ptr + statistics, maxima, mask=row_mask)


@triton.jit
def _logits(
    product,
    columns,
    num_rows,
    bias_ptr,
    cap,
    logit_scale,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the logits of products with the head, and the slope of the soft cap if there is one.

    The logits beyond the vocabulary are minus infinity.
    """
    column_mask = columns < num_rows
    if BIAS:
        product += tl.load(bias_ptr + columns, mask=column_mask, other=0.0)[None, :]
    if SCALE:
        product *= logit_scale
    slope = product  # not read without a soft cap
    if SOFTCAP:
        tanh = _tanh(product * (1.0 / cap), PTX)
        product, slope = cap * tanh, 1.0 - tanh * tanh
    return tl.where(column_mask[None, :], product, float("-inf")), slope


@triton.jit
def _bound(x, INTERPRETED: tl.constexpr):
    """Return ``x`` for a range. The interpreter's own conversion fails with NumPy 2.4."""
    if INTERPRETED:
        return x.handle.data.item()
    else:
        return x


@triton.jit
def _place(tile, num_row_blocks, num_column_blocks, group):
    """Return the block of rows and the block of columns of a tile.

    ``group`` blocks of rows go through all columns together, before the next group.
    """
    tiles_of_group = group * num_column_blocks
    first = tile // tiles_of_group * group
    size = tl.minimum(num_row_blocks - first, group)
    inside = tile % tiles_of_group
    return first + inside % size, inside // size


@triton.jit
def _product_of_descriptors(
    hidden,
    weight,
    first_row,
    first_column,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        a = hidden.load([first_row, start])
        b = weight.load([first_column, start]).T
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product)
    return product


@triton.jit
def _product_of_rows(
    hidden_row,
    weight_row,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    depth = tl.arange(0, DEPTH)
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        if WIDTH % DEPTH == 0:
            a = tl.load(hidden_row + (start + depth)[None, :])
            b = tl.load(weight_row + (start + depth)[:, None])
        else:
            a = tl.load(hidden_row + (start + depth)[None, :], mask=(start + depth)[None, :] < WIDTH, other=0.0)
            b = tl.load(weight_row + (start + depth)[:, None], mask=(start + depth)[:, None] < WIDTH, other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product)
    return product


@triton.jit
def _split(x, PARTS: tl.constexpr):
    """Return the columns of ``x`` in 1 or 4 equal ranges, in order."""
    if PARTS == 1:
        return (x,)
    else:
        tl.static_assert(PARTS == 4)
        left, right = _halves(x)
        first, second = _halves(left)
        third, fourth = _halves(right)
        return first, second, third, fourth


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _exp(x, PTX: tl.constexpr):
    """Return ``exp(x)``, on NVIDIA GPUs with results below 1.2e-38 as zero.

    Otherwise three more instructions of each element scale such results.
    """
    if PTX:
        x = x * 1.4426950408889634
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp(x)


@triton.jit
def _tanh(x, PTX: tl.constexpr):
    """Return ``tanh(x)`` with an absolute error of about 1e-7."""
    denominator = 1.0 + _exp(2.0 * x, PTX)
    if PTX:
        # At most one rounding from the quotient, in one instruction instead of eight.
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / denominator
    return 1.0 - 2.0 * inverse


@triton.jit
def _to_bf16(values, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        # To nearest, halves to even, as a GPU does.
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(tl.bfloat16)


@triton.jit
def _target_products_kernel(hidden_ptr, weight_ptr, index_ptr, products_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the product of one token's hidden state and its target's row of the weight."""
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(index_ptr + token)
    product = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        place = start + tl.arange(0, BLOCK)
        a = tl.load(hidden_ptr + token * WIDTH + place, mask=place < WIDTH, other=0.0)
        b = tl.load(weight_ptr + target * WIDTH + place, mask=place < WIDTH, other=0.0)
        product += a.to(tl.float32) * b.to(tl.float32)
    tl.store(products_ptr + token, tl.sum(product))
