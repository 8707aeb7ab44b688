"""What a run knows of itself between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    """Best evaluation: ``{"step", "name", "loss"}``."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; reading it waits for the device."""

    loss: Tensor
    """[] fp32, this rank's part of the mean loss over the global batch; NaN without targets."""
    grad_norm: Tensor
    """[] fp32, before clipping; not finite, on all ranks, where the loss of any of them is not, or without targets."""
    learning_rate: float
    has_targets: bool = True
    """Whether any rank had a token to predict. Without, nothing was computed and nothing has changed."""
