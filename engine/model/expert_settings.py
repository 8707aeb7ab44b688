"""The facts about the experts of a mixture-of-experts model, and of a family of them. No PyTorch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

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


_LAYER_KEYS: dict[str, list[str]] = {
    "all": [],
    "sparse_step": ["decoder_sparse_step", "mlp_only_layers"],
    "first_dense": ["first_k_dense_replace"],
}
_SHARED_KEYS: dict[str, list[str]] = {
    "none": [],
    "own_size": ["shared_expert_intermediate_size"],
    "number": ["n_shared_experts"],
}
_SCORING_KEYS: dict[str, list[str]] = {
    "softmax": [],
    "sigmoid": ["n_group", "topk_group", "routed_scaling_factor"],
}


class ExpertFamily(NamedTuple):
    """The facts about the experts of a ``model_type``. The defaults are those of Qwen3."""

    num_experts: str = "num_experts"
    """Key of their number."""
    num_experts_alias: str | None = "num_local_experts"
    """Another name of that key, which transformers also writes."""
    default_num_experts: int | None = None
    intermediate_size: str = "moe_intermediate_size"
    """Key of their inner width."""
    layers: Literal["all", "sparse_step", "first_dense"] = "sparse_step"
    """The layers with experts. all: every layer. sparse_step: every ``decoder_sparse_step``-th but those in
    ``mlp_only_layers``. first_dense: all but the first ``first_k_dense_replace``."""
    shared: Literal["none", "own_size", "number"] = "none"
    """The expert of all tokens. own_size: its width is ``shared_expert_intermediate_size``, and it has a gate. number:
    ``n_shared_experts`` times that of an expert."""
    scoring: Scoring = "softmax"
    """sigmoid: as DeepSeek-V3, with groups, a bias for the choice and ``routed_scaling_factor``."""
    normalize: bool | str = "norm_topk_prob"

    @property
    def read_keys(self) -> tuple[str, ...]:
        """Return the keys of these facts."""
        keys: list[str | None] = [
            self.num_experts,
            self.num_experts_alias,
            self.intermediate_size,
            "num_experts_per_tok",
            "router_aux_loss_coef",
        ]
        keys += _LAYER_KEYS[self.layers] + _SHARED_KEYS[self.shared] + _SCORING_KEYS[self.scoring]
        keys += [self.normalize] if isinstance(self.normalize, str) else []
        return tuple(key for key in keys if key is not None)
