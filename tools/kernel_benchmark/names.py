"""Names of the kernels that are measured."""

from __future__ import annotations

KERNELS = ("linear_cross_entropy", "attention", "rms_norm", "rope", "swiglu")
