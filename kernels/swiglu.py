"""SwiGLU activation (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``; both [..., F] of one dtype, which is returned."""
    return F.silu(gate) * up
