"""Name the dtypes in a run's settings."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes by the names of ``training.precision`` (activations and gathered parameters), ``training.weight_dtype``
(weights between steps) and ``optimizer.state_dtype`` (both moments)."""
