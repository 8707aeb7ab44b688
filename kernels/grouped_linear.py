"""Linear layers of experts: groups of rows, each multiplied by a matrix of its own.

Shapes: R rows, E experts, I inputs, O outputs. Rows of one expert are consecutive.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ALIGNED_BYTES = 16
"""``torch._grouped_mm`` needs rows of matrices that begin at multiples of this."""
GROUPED_CAPABILITY = (9, 0)
"""Compute capability of the GPUs that have it."""
_STEP = 32
"""On CPUs, products in half precision have a multiple of so many rows: oneDNN compiles a kernel for each number."""


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix: ``x[rows] @ weight[expert].T``.

    On GPUs with bf16 it is one kernel (``torch._grouped_mm``), which reads ``ends_E`` on the device. Otherwise it is
    one product for each expert that has rows.

    Args:
        x_RI: [R, I], sorted by expert.
        weight_EOI: [E, O, I] of the same dtype.
        ends_E: [E] int32: where the rows of each expert end.

    Returns:
        [R, O] in the same dtype.
    """
    if _has_grouped_kernel(x_RI, weight_EOI):
        return torch._grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    return _grouped_linear(x_RI, weight_EOI, ends_E)


def grouped_linear_reference(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Compute :func:`grouped_linear` row by row, in the dtype of its inputs. For tests in float64."""
    experts_R = torch.searchsorted(ends_E, torch.arange(len(x_RI), device=x_RI.device), right=True)
    return torch.einsum("ri,roi->ro", x_RI, weight_EOI[experts_R])


def _has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    if (
        x.device.type != "cuda"
        or x.dtype != torch.bfloat16
        or torch.cuda.get_device_capability(x.device) < GROUPED_CAPABILITY
    ):
        return False
    return all(size * x.element_size() % _ALIGNED_BYTES == 0 for size in weight.shape[1:])


@torch.library.custom_op("retemper::grouped_linear", mutates_args=())
def _grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    y_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[1])
    for expert, rows in _groups(ends_E):
        matrix, stop = weight_EOI[expert].t(), _rounded_stop(rows, x_RI)
        if stop <= len(x_RI):
            # Rows of later experts that are computed as well are overwritten by theirs.
            torch.mm(x_RI[rows.start : stop], matrix, out=y_RO[rows.start : stop])
        else:
            y_RO[rows] = (_padded(x_RI, rows, stop - rows.start) @ matrix)[: rows.stop - rows.start]
    return y_RO


@_grouped_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(len(x_RI), weight_EOI.shape[1])


@torch.library.custom_op("retemper::grouped_linear_weight_gradient", mutates_args=())
def _weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Return [E, O, I]."""
    gradient = grad_RO.new_empty(len(ends_E), grad_RO.shape[1], x_RI.shape[1])
    groups = _groups(ends_E)
    for expert, rows in groups:
        count = _rounded_stop(rows, x_RI) - rows.start
        torch.mm(_padded(grad_RO, rows, count).t(), _padded(x_RI, rows, count), out=gradient[expert])
    for expert in set(range(len(ends_E))).difference(expert for expert, _ in groups):
        gradient[expert].zero_()
    return gradient


@_weight_gradient.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return grad_RO.new_empty(len(ends_E), grad_RO.shape[1], x_RI.shape[1])


# For tools that count operations. Each row is multiplied by one matrix, however the rows are divided.
@register_flop_formula(torch.ops.retemper.grouped_linear)
def _(x_shape: tuple[int, int], weight_shape: tuple[int, int, int], ends_shape: Any, *, out_shape: Any) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.retemper.grouped_linear_weight_gradient)
def _(grad_shape: tuple[int, int], x_shape: tuple[int, int], ends_shape: Any, *, out_shape: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]


def _rounded_stop(rows: slice, x: Tensor) -> int:
    """Return the end of ``rows`` of ``x``, whose number is rounded up to a multiple of :data:`_STEP` if that pays."""
    if x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return rows.stop
    return rows.start + -(-(rows.stop - rows.start) // _STEP) * _STEP


def _padded(x: Tensor, rows: slice, count: int) -> Tensor:
    """Return [count, ...]: ``rows`` of ``x``, and zeros."""
    num_rows = rows.stop - rows.start
    if num_rows == count:
        return x[rows]
    padded = x.new_empty(count, *x.shape[1:])
    padded[:num_rows] = x[rows]
    padded[num_rows:] = 0
    return padded


def _groups(ends_E: Tensor) -> list[tuple[int, slice]]:
    """Return the experts that have rows, with their rows. Waits for the device."""
    bounds = enumerate(pairwise([0, *ends_E.tolist()]))
    return [(expert, slice(start, stop)) for expert, (start, stop) in bounds if stop > start]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x_RI, weight_EOI, ends_E = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x_RI if needs_weight else None, weight_EOI if needs_x else None, ends_E)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    grad_RO = grad_RO.contiguous()
    grad_x = None if weight_EOI is None else _grouped_linear(grad_RO, weight_EOI.transpose(1, 2), ends_E)
    return grad_x, None if x_RI is None else _weight_gradient(grad_RO, x_RI, ends_E), None


_grouped_linear.register_autograd(_backward, setup_context=_keep)
