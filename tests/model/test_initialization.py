"""Random initialization: statistics, determinism, and which parameters are constants."""

import math

import pytest
import torch

from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture

CONFIG = {
    "model_type": "llama",
    "vocab_size": 1009,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "initializer_range": 0.03,
}


def initialized(seed: int, **changes) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Decoder(parse_architecture({**CONFIG, **changes}))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.initialize_(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "mlp_bias": False}], ids=["llama", "qwen3"])
def test_norms_are_one_and_biases_zero(changes):
    parameters = initialized(0, **changes)
    vectors = {name: value for name, value in parameters.items() if value.ndim == 1}
    assert len(vectors) == (2 * (2 + 7) + 1 if not changes else 2 * (2 + 2 + 4) + 1)
    for name, value in vectors.items():
        assert torch.equal(value, torch.full_like(value, 1.0 if name.endswith("norm.weight") else 0.0)), name


@pytest.mark.parametrize(("family", "center"), [("gemma2", 0.0), ("gpt_neox", 1.0)])
def test_norms_that_add_one_are_zero(family, center):
    """Of a norm that scales by one plus the weight; biases of norms are zero as all others."""
    parameters = initialized(0, model_type=family, mlp_bias=None, attention_bias=False, num_key_value_heads=4)
    norms = {name: value for name, value in parameters.items() if "norm." in name}
    assert len(norms) == {"gemma2": 2 * 4 + 1, "gpt_neox": 2 * (2 * 2 + 1)}[family]
    for name, value in norms.items():
        assert torch.equal(value, torch.full_like(value, center if name.endswith("weight") else 0.0)), name


def test_matrices_are_normal_with_the_configured_width():
    for name, value in initialized(0).items():
        if value.ndim == 1:
            continue
        n, width = value.numel(), CONFIG["initializer_range"]
        # Five standard errors of the mean, of the standard deviation, and of the share beyond one sigma.
        assert abs(value.mean()) <= 5 * width / math.sqrt(n), name
        assert abs(value.std() / width - 1) <= 5 / math.sqrt(2 * n), name
        beyond = (value.abs() > width).double().mean().item()
        assert abs(beyond - 0.3173) <= 5 * math.sqrt(0.3173 * 0.6827 / n), name


def test_a_seed_decides_everything():
    first, again, other = initialized(3), initialized(3), initialized(4)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert value.ndim == 1 or not torch.equal(value, other[name]), name


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    initialized(3)
    assert torch.equal(torch.rand(1), expected)


def test_parameters_are_drawn_independently():
    """No two matrices share a stream, of one seed or of neighbouring seeds."""
    drawn = [value for seed in (3, 4) for value in initialized(seed).values() if value.ndim == 2]
    starts = {tuple(value.flatten()[:8].tolist()) for value in drawn}
    assert len(starts) == len(drawn)


def test_a_tied_head_is_no_parameter():
    names = initialized(0, tie_word_embeddings=True)
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in initialized(0)
