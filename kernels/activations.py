"""Activations of feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """Return ``max(x, 0)^2`` (So et al., 2021, https://arxiv.org/abs/2109.08668) in the dtype of ``x``."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu2": relu_squared,
}
"""Functions by name. gelu_tanh approximates by a hyperbolic tangent (Hendrycks and Gimpel, 2016,
https://arxiv.org/abs/1606.08415)."""

_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu2": lambda grad, x: grad * (2 * F.relu(x)),
}
"""Map the gradient of the result and the argument to the gradient of the argument."""


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Return ``activation(gate) * up`` (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    Both are [..., F] of one dtype, which is returned. With silu this is SwiGLU, with gelu GeGLU.
    """
    return ACTIVATIONS[activation](gate) * up


def weighted_gated(gate: Tensor, up: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """Return :func:`gated` of ``gate`` and ``up``, each row times its weight.

    Only the arguments are kept for the backward pass.

    Args:
        gate: [R, F].
        up: [R, F] of the same dtype.
        weights: [R] fp32.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        [R, F] in the dtype of ``gate``.
    """
    return _WeightedGated.apply(gate, up, weights, activation)


class _WeightedGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        ctx.activation = activation
        return gated(gate, up, activation).mul_(weights[:, None].to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, up, weights = ctx.saved_tensors
        activated = ACTIVATIONS[ctx.activation](gate)
        grad_weights = (grad * (activated * up)).sum(-1, dtype=torch.float32).to(weights.dtype)
        grad_product = grad * weights[:, None].to(grad.dtype)
        grad_gate = _GRADIENTS[ctx.activation](grad_product * up, gate)
        return grad_gate, grad_product.mul_(activated), grad_weights, None
