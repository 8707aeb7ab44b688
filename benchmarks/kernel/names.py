"""Name the measured kernels."""

from __future__ import annotations

KERNELS = ("linear_cross_entropy", "attention", "rms_norm", "rope", "swiglu")
