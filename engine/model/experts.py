"""Mixture-of-experts layers: a router chooses a few feed-forward layers for each token.

No token is dropped, whatever the load of an expert. The number of ranks is unknown here: if ranks share the experts,
``engine/parallel/expert.py`` replaces :attr:`Experts.dispatch`.

Shapes: T tokens, K experts of a token, R = T * K rows, E experts, H hidden, F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.activations import weighted_gated
from ...kernels.grouped_linear import grouped_linear
from ...kernels.token_permutation import RowOrder, combine, expand, order_by_expert, weights_of_rows
from .expert_settings import ExpertSettings
from .local_copy import local_copy


class Routing(NamedTuple):
    """The experts of each token."""

    experts_TK: Tensor
    """[T, K] int64."""
    weights_TK: Tensor
    """[T, K] fp32: factors of their results."""


Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps [R, H] rows sorted by expert, their [R] fp32 weights, and [E] int32 ends of the experts' rows to [R, H]."""
Dispatch = Callable[[Compute, Tensor, Routing], Tensor]
"""Maps [T, H] hidden states and their routing to [T, H]: brings the rows to their experts and the results back."""
Observe = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps [T, E] fp32 logits, [T, E] fp32 scores and [T, K] chosen experts to the same scores, through which the gradients
of the router's losses flow back."""


class Router(nn.Module):
    """Scores the experts for each token in fp32, and chooses those with the highest scores."""

    def __init__(self, settings: ExpertSettings, hidden_size: int):
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.num_experts, hidden_size))
        if settings.selection_bias:
            bias = torch.empty(settings.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.observe: Observe | None = None
        """Adds the losses of the router in training; None: there are none."""

    def forward(self, hidden_TH: Tensor) -> Routing:
        """Route [T, H]."""
        logits_TE = F.linear(hidden_TH.float(), local_copy(self.weight).float())
        scores_TE = self._scores(logits_TE)
        experts_TK = self._choose(scores_TE.detach())
        if self.observe is not None:
            scores_TE = self.observe(logits_TE, scores_TE, experts_TK)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.settings.normalize:
            epsilon = 1e-20 if self.settings.scoring == "sigmoid" else 0.0
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + epsilon)
        return Routing(experts_TK, weights_TK * self.settings.scale if self.settings.scale != 1.0 else weights_TK)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid() if self.settings.scoring == "sigmoid" else logits_TE.softmax(-1)

    @torch.no_grad()
    def _choose(self, scores_TE: Tensor) -> Tensor:
        settings = self.settings
        if settings.selection_bias:
            scores_TE = scores_TE + self.e_score_correction_bias
        if settings.groups > 1:
            grouped_TGE = scores_TE.unflatten(1, (settings.groups, -1))
            group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
            chosen_TG = group_scores_TG.topk(settings.groups_per_token, dim=-1).indices
            excluded_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen_TG, False)
            scores_TE = grouped_TGE.masked_fill(excluded_TG[:, :, None], float("-inf")).flatten(1)
        return scores_TE.topk(settings.per_token, dim=-1).indices


class GroupedLinear(nn.Module):
    """The linear layers of all experts, without biases: [E, out, in]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, rows_RI: Tensor, ends_E: Tensor) -> Tensor:
        """Map [R, in] rows sorted by expert to [R, out]."""
        return grouped_linear(rows_RI, local_copy(self.weight), ends_E)


class Experts(nn.Module):
    """Gated feed-forward layers of one size."""

    def __init__(self, settings: ExpertSettings, hidden_size: int, activation: str):
        super().__init__()
        count, inner = settings.num_experts, settings.intermediate_size
        self.gate_proj = GroupedLinear(count, hidden_size, inner)
        self.up_proj = GroupedLinear(count, hidden_size, inner)
        self.down_proj = GroupedLinear(count, inner, hidden_size)
        self.num_experts, self._activation = count, activation
        self.dispatch: Dispatch = self._dispatch
        self.see_rows: Callable[[RowOrder], object] | None = None
        """Called with the rows before they are computed, if adapters draw a mask for each."""

    def forward(self, hidden_TH: Tensor, routing: Routing) -> Tensor:
        """Map [T, H] to [T, H]."""
        return self.dispatch(self.compute, hidden_TH, routing)

    def compute(self, rows_RH: Tensor, weights_R: Tensor, ends_E: Tensor) -> Tensor:
        """See :data:`Compute`.

        The weights multiply the inner features and not the results: it is the same, and the backward pass does not
        need the results.
        """
        gate_RF, up_RF = self.gate_proj(rows_RH, ends_E), self.up_proj(rows_RH, ends_E)
        return self.down_proj(weighted_gated(gate_RF, up_RF, weights_R, self._activation), ends_E)

    def _dispatch(self, compute: Compute, hidden_TH: Tensor, routing: Routing) -> Tensor:
        order = order_by_expert(routing.experts_TK, self.num_experts)
        if self.see_rows is not None:
            self.see_rows(order)
        rows_RH, weights_R = expand(hidden_TH, order), weights_of_rows(routing.weights_TK, order)
        return combine(compute(rows_RH, weights_R, order.ends_E), order)
