"""All rotary types against transformers, and settings that it would ignore."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from family_models import SHAPE, YARN
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retemper.engine.errors import UserError
from retemper.engine.model.families import NotNative, parse_decoder_architecture
from retemper.engine.model.rope_settings import inverse_frequencies

FACTORS = {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [1 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 128, **FACTORS}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": YARN,
    "yarn that keeps many pairs": {**YARN, "original_max_position_embeddings": 4096, "rope_theta": 1e6},
    "yarn with betas": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn with a factor of attention": {**YARN, "attention_factor": 1.3},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn with half of mscale": {**YARN, "mscale": 0.7},
    "longrope": LONGROPE,
    "longrope with a factor": {**LONGROPE, "factor": 16.0},
    "longrope with a factor of attention": {**LONGROPE, "attention_factor": 1.1},
}


@pytest.mark.parametrize("length", [1, 128, 129, 512, 513, 3000])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_of_documents_of_any_length(case: str, length: int) -> None:
    config = {"model_type": "llama", **SHAPE, "rope_parameters": CASES[case]}
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    expected, factor = ROPE_INIT_FUNCTIONS[CASES[case]["rope_type"]](theirs, seq_len=length)
    rope = parse_decoder_architecture(config).ropes[0]
    assert rope is not None
    actual = torch.tensor(inverse_frequencies(rope, length), dtype=torch.float64)
    torch.testing.assert_close(actual, expected.double(), rtol=2e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "too few factors": ("llama", {"rope_parameters": {**LONGROPE, "long_factor": [1.0]}}, "long_factor is"),
    "a type of phi3": ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    "flat settings of layers that differ": (
        "olmo3",
        {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters is",
    ),
    "another name of theta": ("gpt_neox", {"rope_theta": 1e5}, "rope_theta is 100000.0; .* rotary_emb_base"),
    "an odd part": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.45}, "partial_rotary_factor is 0.45"),
    "two parts": (
        "stablelm",
        {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25; partial_rotary_factor at the top",
    ),
    "queries that do not grow": ("ministral3", {"rope_parameters": YARN}, "llama_4_scaling_beta is None"),
    "growing queries elsewhere": (
        "llama",
        {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta is 0.1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_something_else_is_refused(case: str) -> None:
    family, change, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        parse_decoder_architecture({"model_type": family, **SHAPE, **change}, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "axial"}}),
        ("llama", {"hidden_act": "tanh"}),
        ("seed_oss", {}),  # dropout is 0.1 unless the config says otherwise
        ("stablelm", {"qk_layernorm": True}),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}),
        ("bloom", {}),
    ],
)
def test_sound_configs_that_another_implementation_may_compute(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(NotNative):
        parse_decoder_architecture({"model_type": family, **SHAPE, **change})


def test_contradictions_are_errors_for_every_implementation() -> None:
    for change in ({"logits_scaling": 8.0}, {"hidden_size": 66}, {"rope_scaling": {"factor": 2.0}}):
        with pytest.raises(UserError) as caught:
            parse_decoder_architecture({"model_type": "llama", **SHAPE, **change})
        assert not isinstance(caught.value, NotNative)
