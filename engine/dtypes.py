"""The dtypes that a run's settings name."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By the names of ``training.precision`` (activations and gathered parameters), ``training.weight_dtype`` (weights
between steps) and ``optimizer.state_dtype`` (both moments)."""
