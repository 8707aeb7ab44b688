"""rms_norm, rope and swiglu as Triton kernels: one launch forward, one backward.

Each is a pair of custom operators (``torch.ops.retemper``) joined by an autograd formula, so torch.compile puts a call
into its graph without looking inside. Arithmetic is fp32, and values are rounded to the inputs' dtype where PyTorch's
own sequence of operators rounds them: for bf16 the results are those of the reference, but for the approximations of
exp, rsqrt and division and the order of sums, which can move a value across a rounding boundary.

Weight gradients are summed in two stages, by a fixed number of programs over fixed rows, then over the programs: no
atomics, the same bits on every run. Second derivatives are not offered.

Measured on no GPU yet: which implementation is faster is not known, so nothing chooses this one by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_support import interpreted, triton_refusal

MAX_WIDTH = 65536
"""Longest row that one program of rms_norm holds in registers."""
TILE = 2048
"""Elements that a program works on at a time, where a row is not longer."""
PARTIAL_SUMS = 512
"""Rows are shared out to at most so many programs that sum a weight's gradient; each writes [H] fp32. A constant, not
the number of processors, so that the order of the sum is the same on every device."""
_INTERPRETED = tl.constexpr(interpreted())


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`retemper.kernels.rms_norm.rms_norm`; ``weight`` in the dtype of ``x``, any strides."""
    _check("rms_norm", x, weight=weight, residual=residual)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x has {x.shape[-1]} columns")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]:,}; the Triton kernel takes at most {MAX_WIDTH:,}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
    y, total, _ = torch.ops.retemper.rms_norm(x, weight, eps, residual)
    return y if residual is None else (y, total)


def fused_rope(q_TND: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`retemper.kernels.rope.apply_rope_to_pair`; heads of any strides. Angles are constants."""
    _check("rope", q_TND, k=k_TKD)
    num_tokens, _, head_dim = q_TND.shape
    if k_TKD.shape[0] != num_tokens or k_TKD.shape[2] != head_dim or head_dim % 2:
        raise ValueError(f"rope: q has shape {tuple(q_TND.shape)}, k {tuple(k_TKD.shape)}; T and an even D must agree")
    for angles in (cos_TD, sin_TD):
        if angles.shape != (num_tokens, head_dim) or angles.requires_grad:
            raise ValueError(f"rope: cos and sin must be constants [{num_tokens}, {head_dim}]")
    return torch.ops.retemper.rope(q_TND, k_TKD, cos_TD, sin_TD, False)


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`retemper.kernels.swiglu.swiglu`; any strides."""
    _check("swiglu", gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate has shape {tuple(gate.shape)}, up {tuple(up.shape)}")
    return torch.ops.retemper.swiglu(gate, up)


def _check(name: str, x: Tensor, **others: Tensor | None) -> None:
    refusal = triton_refusal(x.device.type)
    if refusal is not None:
        raise ValueError(f"{name}: {refusal}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: dtype {x.dtype}; the Triton kernel takes fp32, bf16 and fp16")
    for other, tensor in others.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name}: {other} is {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device}")


def _as_rows(x: Tensor) -> Tensor:
    """[..., H] as [rows, H] with adjacent columns; copied only where strides do not allow a view."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _num_warps(tile: int) -> int:
    return min(16, max(4, tile // 512))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Offsets of rows are int64: T x H passes 2^31 at long contexts.


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """fp32 -> the nearest value of ``dtype`` (ties to even), as fp32."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion cuts the low bits off.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    inverse_rms_ptr,
    num_rows,
    width,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_H)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    here = rows[:, None] * width + columns[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        x = _rounded(residual.to(tl.float32) + x, dtype)
        tl.store(total_ptr + here, x.to(dtype), mask=mask)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(inverse_rms_ptr + rows, inverse_rms, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    normalized = _rounded(x * inverse_rms[:, None], dtype)
    tl.store(y_ptr + here, _rounded(weight[None, :] * normalized, dtype).to(dtype), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    inverse_rms_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    width,
    grad_stride,
    grad_total_stride,
    x_stride,
    HAS_GRAD_TOTAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """With n = x r and r = 1 / rms: dn = w dy, dx = r (dn - n mean(dn n)); the weight's part is the sum of dy n."""
    dtype: tl.constexpr = grad_x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TILES * BLOCK_ROWS
    columns = tl.arange(0, BLOCK_H)
    in_row = columns < width
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK_ROWS, BLOCK_H), dtype=tl.float32)
    for tile in range(TILES):
        rows = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_rows)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + rows, mask=rows < num_rows, other=0.0)
        normalized = x * inverse_rms[:, None]
        grad_normalized = _rounded(grad * weight[None, :], dtype)
        mean = tl.sum(grad_normalized * normalized, axis=1) / width
        grad_x = _rounded(inverse_rms[:, None] * (grad_normalized - normalized * mean[:, None]), dtype)
        if HAS_GRAD_TOTAL:
            other = grad_total_ptr + rows[:, None] * grad_total_stride + columns[None, :]
            grad_x = _rounded(grad_x + tl.load(other, mask=mask, other=0.0).to(tl.float32), dtype)
        tl.store(grad_x_ptr + rows[:, None] * width + columns[None, :], grad_x.to(dtype), mask=mask)
        if WEIGHT_GRAD:
            partial += grad * _rounded(normalized, dtype)
    if WEIGHT_GRAD:
        row = tl.program_id(0).to(tl.int64) * width
        tl.store(partial_ptr + row + columns, tl.sum(partial, axis=0), mask=in_row)


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    token,
    heads,
    num_heads,
    half,
    token_stride,
    head_stride,
    INVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turns pairs (i, i + half) of one token's ``heads``; INVERSE is the transposed matrix, the gradient."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pairs = tl.arange(0, BLOCK_D)
    in_half = pairs < half
    angle = token * 2 * half + pairs
    # The reference multiplies by angles in the heads' dtype.
    cos_first = _rounded(tl.load(cos_ptr + angle, mask=in_half, other=0.0).to(tl.float32), dtype)[None, :]
    cos_second = _rounded(tl.load(cos_ptr + angle + half, mask=in_half, other=0.0).to(tl.float32), dtype)[None, :]
    sin_first = _rounded(tl.load(sin_ptr + angle, mask=in_half, other=0.0).to(tl.float32), dtype)[None, :]
    sin_second = _rounded(tl.load(sin_ptr + angle + half, mask=in_half, other=0.0).to(tl.float32), dtype)[None, :]
    mask = (heads < num_heads)[:, None] & in_half[None, :]
    source = x_ptr + token * token_stride + heads[:, None] * head_stride + pairs[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        crossed_first, crossed_second = second * sin_second, -first * sin_first
    else:
        crossed_first, crossed_second = -second * sin_first, first * sin_second
    turned_first = _rounded(_rounded(first * cos_first, dtype) + _rounded(crossed_first, dtype), dtype)
    turned_second = _rounded(_rounded(second * cos_second, dtype) + _rounded(crossed_second, dtype), dtype)
    target = y_ptr + (token * num_heads + heads[:, None]) * 2 * half + pairs[None, :]
    tl.store(target, turned_first.to(dtype), mask=mask)
    tl.store(target + half, turned_second.to(dtype), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    num_heads,
    num_kv_heads,
    half,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    q_blocks,
    INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program turns BLOCK_N heads of one token: the first ``q_blocks`` of queries, the rest of keys."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block < q_blocks:
        heads = block * BLOCK_N + tl.arange(0, BLOCK_N)
        _rotate_heads(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, token, heads, num_heads, half,
            q_token_stride, q_head_stride, INVERSE, BLOCK_D,
        )  # fmt: skip
    else:
        heads = (block - q_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        _rotate_heads(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, token, heads, num_kv_heads, half,
            k_token_stride, k_head_stride, INVERSE, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, blocks, BLOCK: tl.constexpr):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated = _rounded(gate / (1.0 + tl.exp(-gate)), dtype)
    tl.store(y_ptr + row * width + columns, _rounded(activated * up, dtype).to(dtype), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    width,
    grad_stride,
    gate_stride,
    up_stride,
    blocks,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = grad_gate_ptr.dtype.element_ty
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_up = _rounded(grad * _rounded(gate * sigmoid, dtype), dtype)
    grad_gate = _rounded(_rounded(grad * up, dtype) * sigmoid * (1.0 + gate * (1.0 - sigmoid)), dtype)
    tl.store(grad_up_ptr + row * width + columns, grad_up.to(dtype), mask=mask)
    tl.store(grad_gate_ptr + row * width + columns, grad_gate.to(dtype), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


@torch.library.custom_op("retemper::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Result, x + residual (empty without one), 1 / rms of every row in fp32."""
    rows = _as_rows(x)
    residual_rows = rows if residual is None else _as_rows(residual)
    y, total, inverse_rms = _rms_norm_outputs(x, weight, eps, residual)
    num_rows, width = rows.shape
    block_h, block_rows = _tile_of(width)
    if rows.numel():
        _rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
            rows, residual_rows, weight.contiguous(), y, total, inverse_rms, num_rows, width, rows.stride(0),
            residual_rows.stride(0), eps, HAS_RESIDUAL=residual is not None, BLOCK_ROWS=block_rows, BLOCK_H=block_h,
            num_warps=_num_warps(block_rows * block_h),
        )  # fmt: skip
    return y, total, inverse_rms


@_rms_norm_op.register_fake
def _rms_norm_outputs(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _tile_of(width: int) -> tuple[int, int]:
    """Columns and rows of a program's tile; both powers of two, as Triton wants them."""
    block_h = triton.next_power_of_2(width)
    return block_h, max(1, TILE // block_h)


@torch.library.custom_op("retemper::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual, the same one) and of the weight (empty unless asked for)."""
    rows, grad_rows = _as_rows(x), _as_rows(grad)
    total_rows = grad_rows if grad_total is None else _as_rows(grad_total)
    num_rows, width = rows.shape
    block_h, block_rows = _tile_of(width)
    # A compile-time constant of the kernel: the interpreter cannot loop up to a number known at run time only.
    tiles = max(1, triton.cdiv(triton.cdiv(num_rows, block_rows), PARTIAL_SUMS))
    programs = triton.cdiv(num_rows, tiles * block_rows)
    grad_x, grad_weight = _rms_norm_backward_outputs(grad, grad_total, x, weight, inverse_rms, weight_grad)
    partial = inverse_rms.new_empty(programs if weight_grad else 0, width)
    if rows.numel():
        _rms_norm_backward_kernel[(programs,)](
            grad_rows, total_rows, rows, weight.contiguous(), inverse_rms, grad_x, partial, num_rows, width,
            grad_rows.stride(0), total_rows.stride(0), rows.stride(0), HAS_GRAD_TOTAL=grad_total is not None,
            WEIGHT_GRAD=weight_grad, TILES=tiles, BLOCK_ROWS=block_rows, BLOCK_H=block_h,
            num_warps=_num_warps(block_rows * block_h),
        )  # fmt: skip
    if weight_grad:
        grad_weight.copy_(partial.sum(0))
    return grad_x, grad_weight


@_rms_norm_backward_op.register_fake
def _rms_norm_backward_outputs(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse_rms: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, total, inverse_rms = output
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, inverse_rms)
    ctx.has_residual = residual is not None


def _rms_norm_gradients(ctx, grad, grad_total, _):
    x, weight, inverse_rms = ctx.saved_tensors
    grad_total = grad_total if ctx.has_residual else None
    if grad is None:  # Only the sum was used.
        return grad_total, None, None, grad_total
    grad_x, grad_weight = torch.ops.retemper.rms_norm_backward(
        grad, grad_total, x, weight, inverse_rms, ctx.needs_input_grad[1]
    )
    return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, grad_x if ctx.has_residual else None


_rms_norm_op.register_autograd(_rms_norm_gradients, setup_context=_rms_norm_setup)


@torch.library.custom_op("retemper::rope", mutates_args=())
def _rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Heads turned by their angles; ``inverse`` turns back, which is also the gradient."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = _rope_outputs(q, k, cos, sin, inverse)
    num_tokens, num_heads, head_dim = q.shape
    block_d = triton.next_power_of_2(head_dim // 2)
    block_n = min(triton.next_power_of_2(max(num_heads, k.shape[1], 1)), max(1, TILE // block_d))
    q_blocks, k_blocks = triton.cdiv(num_heads, block_n), triton.cdiv(k.shape[1], block_n)
    if num_tokens * head_dim * (q_blocks + k_blocks):
        _rope_kernel[(num_tokens, q_blocks + k_blocks)](
            q, k, cos.contiguous(), sin.contiguous(), q_out, k_out, num_heads, k.shape[1], head_dim // 2,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), q_blocks, INVERSE=inverse, BLOCK_N=block_n,
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


@_rope_op.register_fake
def _rope_outputs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rope_setup(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_gradients(ctx, grad_q, grad_k):
    return *torch.ops.retemper.rope(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope_op.register_autograd(_rope_gradients, setup_context=_rope_setup)


@torch.library.custom_op("retemper::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    y = _swiglu_output(gate, up)
    (gate_rows, up_rows), grid, width, blocks = _swiglu_rows(gate, up)
    if y.numel():
        strides = gate_rows.stride(0), up_rows.stride(0)
        _swiglu_kernel[grid](gate_rows, up_rows, y, width, *strides, blocks, BLOCK=TILE, num_warps=4)
    return y


@_swiglu_op.register_fake
def _swiglu_output(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("retemper::swiglu_backward", mutates_args=())
def _swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_gate, grad_up = _swiglu_backward_outputs(grad, gate, up)
    (grad_rows, gate_rows, up_rows), grid, width, blocks = _swiglu_rows(grad, gate, up)
    if grad.numel():
        strides = grad_rows.stride(0), gate_rows.stride(0), up_rows.stride(0)
        _swiglu_backward_kernel[grid](
            grad_rows, gate_rows, up_rows, grad_gate, grad_up, width, *strides, blocks, BLOCK=TILE, num_warps=4
        )
    return grad_gate, grad_up


@_swiglu_backward_op.register_fake
def _swiglu_backward_outputs(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_rows(*tensors: Tensor) -> tuple[list[Tensor], tuple[int], int, int]:
    """The tensors as rows (one long row where all are contiguous), the grid, a row's width and programs."""
    if all(x.is_contiguous() for x in tensors):
        rows = [x.reshape(1, -1) for x in tensors]
    else:
        rows = [_as_rows(x) for x in tensors]
    num_rows, width = rows[0].shape
    blocks = triton.cdiv(width, TILE)
    return rows, (num_rows * blocks,), width, blocks


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx, grad):
    return torch.ops.retemper.swiglu_backward(grad, *ctx.saved_tensors)


_swiglu_op.register_autograd(_swiglu_gradients, setup_context=_swiglu_setup)
