"""The router's choices, weights and gradients against the published formulas in float64, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retemper.engine.model.expert_settings import ExpertSettings
from retemper.engine.model.experts import Router

TOKENS, EXPERTS, HIDDEN = 40, 8, 16
SETTINGS = {
    "softmax, normalized": {},
    "softmax": {"normalize": False},
    "sigmoid with a bias": {"scoring": "sigmoid", "selection_bias": True, "scale": 2.5},
    "sigmoid of groups": {
        "scoring": "sigmoid",
        "selection_bias": True,
        "scale": 1.5,
        "groups": 4,
        "groups_per_token": 2,
    },
    "sigmoid, not normalized": {"scoring": "sigmoid", "selection_bias": True, "normalize": False},
}


def router(**changes: object) -> Router:
    settings = ExpertSettings(layers=(True,), num_experts=EXPERTS, per_token=3, intermediate_size=8, **changes)
    made = Router(settings, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made


def routed_by_hand(settings: ExpertSettings, scores: list[float], bias: list[float]) -> dict[int, float]:
    """The weights of one token's experts (DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437, section 2.1.2)."""
    selection = [score + extra for score, extra in zip(scores, bias, strict=True)]
    size = EXPERTS // settings.groups
    groups = [list(range(start, start + size)) for start in range(0, EXPERTS, size)]
    if settings.groups > 1:
        best = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: -best[g])[: settings.groups_per_token]
        groups = [groups[g] for g in kept]
    allowed = [expert for group in groups for expert in group]
    chosen = sorted(allowed, key=lambda expert: -selection[expert])[: settings.per_token]
    total = sum(scores[expert] for expert in chosen) if settings.normalize else 1.0
    return {expert: settings.scale * scores[expert] / total for expert in chosen}


def scores_by_hand(settings: ExpertSettings, logits: Tensor) -> list[float]:
    values = logits.tolist()
    if settings.scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in values]
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


@pytest.mark.parametrize("case", SETTINGS)
def test_choices_and_weights(case: str) -> None:
    made = router(**SETTINGS[case])
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    routing = made(hidden)
    assert routing.experts_TK.dtype == torch.int64 and routing.weights_TK.dtype == torch.float32
    logits = hidden.double() @ made.weight.detach().double().t()
    bias = made.e_score_correction_bias.tolist() if made.settings.selection_bias else [0.0] * EXPERTS
    unbiased = 0
    for token in range(TOKENS):
        scores = scores_by_hand(made.settings, logits[token])
        expected = routed_by_hand(made.settings, scores, bias)
        actual = dict(zip(routing.experts_TK[token].tolist(), routing.weights_TK[token].tolist(), strict=True))
        assert actual == pytest.approx(expected, rel=2e-6), token
        unbiased += actual.keys() == routed_by_hand(made.settings, scores, [0.0] * EXPERTS).keys()
    assert (unbiased < TOKENS) == made.settings.selection_bias, "the bias changes no choice here"


@pytest.mark.parametrize("case", SETTINGS)
def test_gradients(case: str) -> None:
    """Of the weights, by the chosen scores alone; in float64 with the same choices. The bias has none."""
    made = router(**SETTINGS[case])
    settings = made.settings
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = made(hidden)
    upstream = torch.randn(routing.weights_TK.shape, generator=torch.Generator().manual_seed(2))
    routing.weights_TK.backward(upstream)
    hidden64, weight64 = (value.detach().double().requires_grad_() for value in (hidden, made.weight))
    logits = hidden64 @ weight64.t()
    scores = logits.sigmoid() if settings.scoring == "sigmoid" else logits.softmax(-1)
    weights = scores.gather(1, routing.experts_TK)
    weights = settings.scale * (weights / weights.sum(-1, keepdim=True) if settings.normalize else weights)
    weights.backward(upstream.double())
    for actual, expected in ((hidden.grad, hidden64.grad), (made.weight.grad, weight64.grad)):
        assert (actual - expected).norm() <= 2e-6 * expected.norm()
    if settings.selection_bias:
        assert made.e_score_correction_bias.grad is None and not made.e_score_correction_bias.requires_grad


def test_scores_of_bf16_are_computed_in_fp32() -> None:
    made, rounded = router(), router()
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        rounded.weight.copy_(made.weight.bfloat16())
    expected = rounded(hidden.float())
    actual = made.bfloat16()(hidden)
    assert torch.equal(actual.experts_TK, expected.experts_TK) and torch.equal(actual.weights_TK, expected.weights_TK)


def test_observed_scores_are_the_same_and_pass_gradients_on() -> None:
    made, seen = router(), []
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    plain = made(hidden)

    def observe(logits: Tensor, scores: Tensor, experts: Tensor) -> Tensor:
        seen.append((logits, scores, experts))
        return scores * 2

    made.observe = observe
    routing = made(hidden)
    (logits, scores, experts) = seen[0]
    assert logits.shape == scores.shape == (TOKENS, EXPERTS) and torch.equal(experts, plain.experts_TK)
    assert torch.allclose(logits.softmax(-1), scores)
    assert torch.allclose(routing.weights_TK, plain.weights_TK)  # normalized: the factor cancels
