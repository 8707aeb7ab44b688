"""The facts about the experts of a mixture-of-experts model. No PyTorch is needed for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class ExpertSettings:
    """The experts of a model, and how a router chooses those of a token."""

    layers: tuple[bool, ...]
    """Whether each layer has experts instead of one feed-forward layer."""
    num_experts: int
    per_token: int
    """Number of experts of each token."""
    intermediate_size: int
    """Inner width of an expert."""
    shared_intermediate_size: int = 0
    """Inner width of the expert that computes every token; 0: none."""
    shared_gate: bool = False
    """Whether a learned gate multiplies the result of the shared expert."""
    scoring: Scoring = "softmax"
    """Function from the router's logits to scores."""
    normalize: bool = True
    """Whether the scores of a token's experts are divided by their sum."""
    scale: float = 1.0
    """Factor of the weights of the experts."""
    groups: int = 1
    """Number of groups of experts."""
    groups_per_token: int = 1
    """Number of groups from which the experts of a token are chosen: those with the largest sum of two scores."""
    selection_bias: bool = False
    """Whether a bias of each expert, which training does not learn by gradients, is added to the scores for the choice
    (Wang et al., 2024, https://arxiv.org/abs/2408.15664)."""
    aux_loss_coef: float = 0.0
    """Factor of the load-balancing loss according to the ``config.json``."""

    @property
    def num_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.layers)
