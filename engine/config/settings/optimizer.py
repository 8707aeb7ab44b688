"""Settings of the optimizer and of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OPTIMIZERS = ("adamw", "adamw_8bit", "muon", "lion")
"""The values of ``optimizer.name`` that are not import paths."""


@dataclass(frozen=True)
class ParameterGroupConfig:
    """Parameters with a learning rate or a weight decay of their own."""

    match: str | list[str]
    """Shell pattern of parameter names, or several: ``model.embed_tokens.*``, ``"*norm*"``. A pattern that matches no
    trainable parameter is refused, and so are two groups that match the same one."""
    learning_rate: float | None = None
    """Peak learning rate of the group. The shape of the schedule is that of all others: every rate, also the minimum,
    is multiplied by this over ``optimizer.learning_rate``. Null: the common one."""
    weight_decay: float | None = None
    """Decoupled weight decay of all parameters of the group, norms and biases included. Null: the common rule."""


@dataclass(frozen=True)
class MuonConfig:
    """Options of Muon."""

    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    scale: Literal["rms", "spectral"] = "rms"
    """Size of an update of a matrix. rms: 0.2 sqrt(max(rows, columns)), about that of AdamW's updates, so that AdamW's
    learning rates apply (Moonlight). spectral: sqrt(max(1, rows / columns)) of the original Muon; its learning rates
    are about 0.02, and ``optimizer.groups`` then gives AdamW's parameters theirs."""
    newton_schulz_steps: int = 5
    """Iterations that orthogonalize a matrix."""
    newton_schulz_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of these iterations, and of the matrices that ranks exchange. auto: bf16 on a GPU, fp32 on a CPU."""
    exclude: list[str] = field(default_factory=list)
    """Shell patterns of names of further parameters that AdamW updates, such as ``["*.mlp.gate.weight"]`` for the
    routers of experts. A pattern that matches no trainable parameter is refused."""


@dataclass(frozen=True)
class LionConfig:
    """Options of Lion."""

    beta1: float = 0.9
    """Weight of the momentum in an update."""
    beta2: float = 0.99
    """Decay of the momentum."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its learning rate."""

    name: str = "adamw"
    """adamw: the usual choice. adamw_8bit: AdamW whose states of matrices take 2 bytes per parameter instead of 8;
    needs torchao. muon: Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases;
    needs fewer tokens for the same loss. lion: half the states of AdamW; use a third to a tenth of its learning rate.
    Or the import path of a subclass of ``torch.optim.Optimizer``, such as ``my_module.MyOptimizer``; its
    module is also found in the folder of the ``--config`` file. See docs/training_methods.md."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class that ``optimizer.name`` imports. ``lr`` and ``weight_decay`` come from the settings
    here."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    min_learning_rate: float | None = None
    """Learning rate at the end of the decay. Null: ``min_learning_rate_ratio`` of the peak."""
    min_learning_rate_ratio: float | None = None
    """Learning rate at the end of the decay as a fraction of the peak, instead of ``min_learning_rate``. Null: 0.1."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    """Shape after the warm-up. cosine, linear: fall to the minimum at the end of the run. wsd: stay at the peak and
    fall over the last ``decay_tokens``, ``decay_steps`` or ``decay_ratio``. constant: stay at the peak. inverse_sqrt:
    peak x sqrt(warm-up tokens / tokens), down to the minimum, whatever the length of the run."""
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the wsd schedule's decay. linear; sqrt: 1 - sqrt(progress), which falls faster at first; cosine."""
    decay_tokens: int | None = None
    """Length of the wsd schedule's decay. Null, without ``decay_steps`` and ``decay_ratio``: a tenth of the
    schedule."""
    decay_steps: int | None = None
    """Instead of ``decay_tokens``: number of steps of the decay."""
    decay_ratio: float | None = None
    """Instead of ``decay_tokens``: decay as a fraction of the schedule, which is the whole run unless
    ``schedule_start_tokens`` is set."""
    schedule_start_tokens: int = 0
    """Token count, on the scale of ``training.train_tokens``, at which the schedule begins. To train on with a
    second warm-up after the budget was raised, set it to the old budget. That warm-up begins at the minimum instead of
    zero. It reaches the peak ``training.warmup_tokens`` later, and the decay lasts until ``train_tokens``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms and biases are not decayed."""
    beta1: float = 0.9
    """Decay of AdamW's first moment. Lion has its own ``beta1`` and ``beta2``."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the optimizer's states: AdamW's two moments take 8 or 4 bytes per parameter, see
    ``training.weight_dtype``; the momentum of Muon and Lion takes half. bf16: updates are computed in fp32 and stored
    with stochastic rounding. adamw_8bit has no choice: 8 bits for matrices whose rows are a multiple of 256 wide, fp32
    for the rest."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down. 0: no clipping."""
    child_tuning: float | None = None
    """Probability with which an element of a parameter keeps its gradient in a step; the gradients that are kept are
    divided by it (child-tuning without a task). Regularizes a run on a small corpus. Null: all gradients are kept."""
    groups: list[ParameterGroupConfig] = field(default_factory=list)
    """Parameters with other learning rates or weight decays, by patterns of their names."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    lion: LionConfig = field(default_factory=LionConfig)

    @property
    def has_state_dtype(self) -> bool:
        """Whether ``state_dtype`` applies."""
        return self.name in OPTIMIZERS and self.name != "adamw_8bit"

    @property
    def states(self) -> str:
        """Describe the numbers that states consist of."""
        return "8-bit" if self.name == "adamw_8bit" else self.state_dtype
