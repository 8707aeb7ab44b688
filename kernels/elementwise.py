"""Name the implementations of rms_norm, rope and swiglu."""

from __future__ import annotations

from typing import Literal

Implementation = Literal["torch", "triton"]
"""torch: plain PyTorch, the reference. triton: one fused kernel forward and one backward."""
