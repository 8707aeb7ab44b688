"""Activations of feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

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


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Return ``activation(gate) * up`` (Shazeer, 2020, https://arxiv.org/abs/2002.05202).

    Both are [..., F] of one dtype, which is returned. With silu this is SwiGLU, with gelu GeGLU.
    """
    return ACTIVATIONS[activation](gate) * up
