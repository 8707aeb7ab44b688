"""Settings of the optimizer and of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    min_learning_rate: float | None = None
    """Learning rate at the end of the decay. Null: ``min_learning_rate_ratio`` of the peak."""
    min_learning_rate_ratio: float | None = None
    """Learning rate at the end of the decay as a fraction of the peak, instead of ``min_learning_rate``. Null: 0.1."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    """Shape after the warm-up. cosine, linear: fall to the minimum at ``train_tokens``. wsd: stay at the peak and fall
    over the last ``decay_tokens``. constant: stay at the peak. inverse_sqrt: peak x sqrt(warm-up tokens / tokens), down
    to the minimum, whatever the length of the run."""
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the wsd schedule's decay. linear; sqrt: 1 - sqrt(progress), which falls faster at first; cosine."""
    decay_tokens: int | None = None
    """Length of the wsd schedule's decay. Null: a tenth of the schedule."""
    schedule_start_tokens: int = 0
    """Token count, on the scale of ``training.train_tokens``, at which the schedule begins. To train on with a
    second warm-up after the budget was raised, set it to the old budget. That warm-up begins at the minimum instead of
    zero. It reaches the peak ``training.warmup_tokens`` later, and the decay lasts until ``train_tokens``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms and biases are not decayed."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's two moments: 8 or 4 bytes per parameter, see ``training.weight_dtype``. bf16: updates are
    computed in fp32 and stored with stochastic rounding."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down. 0: no clipping."""
