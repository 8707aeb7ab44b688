"""SwiGLU activation (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .elementwise import Implementation


def swiglu(gate: Tensor, up: Tensor, *, implementation: Implementation = "torch") -> Tensor:
    """Return ``silu(gate) * up``, elementwise; both are [..., F] of one dtype, which is that of the result.

    ``implementation`` "triton" rounds the same values and keeps only the two inputs for the backward pass.

    Raises:
        ValueError: implementation "triton" cannot process these tensors.
    """
    if implementation == "triton":
        from .elementwise_triton import fused_swiglu

        return fused_swiglu(gate, up)
    return F.silu(gate) * up
