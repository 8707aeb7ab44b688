"""Check kernels on this GPU against a float64 reference before a run uses them: once per process, in milliseconds.

The checked kernels are faster than those that replace them, but their results depend on the versions of PyTorch, cuDNN
and the GPU. :func:`shared_heads_problem` and :func:`cudnn_problem` remember what they found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import flash
from .per_document import batched_attention, per_document_attention

_HEADS, _KV_HEADS = 6, 2
_PACKED = (192, 65, 1, 126)
_BATCHED = (192, 192)  # Not a multiple of cuDNN's tiles of 128 tokens.
_BOUND = 2e-2
"""Largest relative error. bf16 results have errors of a few 1e-3; a wrong result is wrong by more than 0.1."""


@functools.cache
def shared_heads_problem(
    implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Return why ``varlen_attn`` cannot take fewer key and value heads than query heads; None if it can.

    Args:
        implementation: see :func:`flash.use_implementation`.
        device: the GPU.
        dtype: of queries, keys and values.
        head_dim: of queries, keys and values.
    """
    flash.use_implementation(implementation)
    offsets = torch.tensor([0, *_PACKED, 0]).cumsum(0).to(device, torch.int32)  # the last document is padding

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.varlen_attention(q, k, v, offsets, max(_PACKED), shares_heads=True)

    return find_problem(packed, _PACKED, device, dtype, head_dim)


@functools.cache
def cudnn_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why cuDNN cannot compute documents of one length; None if it can. Arguments as above."""

    def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return batched_attention(q, k, v, len(_BATCHED), only_cudnn=True)

    return find_problem(batched, _BATCHED, device, dtype, head_dim)


def find_problem(
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> str | None:
    """Return what is wrong with the output or the gradients of causal attention by ``kernel``; None if nothing is."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(sum(lengths), heads, head_dim) for heads in (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS)]
    *inputs, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    try:
        actual = _with_gradients(kernel, inputs, upstream)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"it raises {' '.join(str(error).split())[:120]}"
    expected = _with_gradients(
        functools.partial(per_document_attention, lengths=lengths), [x.double() for x in inputs], upstream.double()
    )
    errors = {
        name: float((ours.double() - wanted).norm() / wanted.norm())
        for name, ours, wanted in zip(("output", "dQ", "dK", "dV"), actual, expected, strict=True)
    }
    wrong = {name: error for name, error in errors.items() if not error <= _BOUND}  # also if it is not a number
    return f"wrong by {', '.join(f'{error:.2g} in {name}' for name, error in wrong.items())}" if wrong else None


def _with_gradients(kernel: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = kernel(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream)
    return [output.detach(), *gradients]
