"""SwiGLU activation (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .elementwise import Implementation


def swiglu(gate: Tensor, up: Tensor, *, implementation: Implementation = "torch") -> Tensor:
    """``silu(gate) * up``, elementwise; both [..., F] of one dtype, which is returned.

    ``implementation`` "triton" rounds the same values and keeps only the two inputs for the backward pass.

    Raises:
        ValueError: implementation "triton" and it cannot take these tensors.
    """
    if implementation == "triton":
        from .elementwise_triton import fused_swiglu

        return fused_swiglu(gate, up)
    return F.silu(gate) * up
