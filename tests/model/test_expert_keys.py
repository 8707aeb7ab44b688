"""Mixtures of experts in ``config.json``: published files, other spellings, contradictions, and what is not native."""

from __future__ import annotations

import math
from typing import Any

import pytest
from family_models import hf_config

from retemper.engine.config.settings import ModelConfig
from retemper.engine.errors import UserError
from retemper.engine.model.changed_config import with_settings
from retemper.engine.model.config_keys import unread_keys
from retemper.engine.model.families import DecoderArchitecture, parse_decoder_architecture
from retemper.engine.model.implementations import meta_model, parse_architecture

QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GLM: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "head_dim": 128,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "vocab_size": 151552,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Qwen/Qwen3-30B-A3B": (
        {
            **QWEN,
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rope_scaling": None,
            "sliding_window": None,
        },
        30.5,
        3.3,
    ),
    "Qwen/Qwen2-57B-A14B": (
        {
            **QWEN,
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "moe_intermediate_size": 2560,
            "num_attention_heads": 28,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "shared_expert_intermediate_size": 20480,
            "sliding_window": 65536,
        },
        57.4,
        14.2,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        {
            **QWEN,
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
        },
        14.3,
        2.7,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 32000,
        },
        46.7,
        12.9,
    ),
    "allenai/OLMoE-1B-7B-0924": (
        {
            "architectures": ["OlmoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "clip_qkv": None,
            "eos_token_id": 50279,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "model_type": "olmoe",
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": 50304,
        },
        6.9,
        1.3,
    ),
    "zai-org/GLM-4.5": (
        {
            **GLM,
            "first_k_dense_replace": 3,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_hidden_layers": 92,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
        353,  # 355 with rounding and the layer that predicts the token after the next one
        34,  # 32 without embedding and head
    ),
    "zai-org/GLM-4.5-Air": (
        {
            **GLM,
            "first_k_dense_replace": 1,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_hidden_layers": 46,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
        },
        107,  # published as 106
        13,  # 12 without embedding and head
    ),
    "rednote-hilab/dots.llm1.base": (
        {
            "architectures": ["Dots1ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 10944,
            "max_position_embeddings": 32768,
            "model_type": "dots1",
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 62,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000000,
            "routed_scaling_factor": 2.5,
            "scoring_func": "noaux_tc",
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        142,
        14,
    ),
}
"""Config, billions of parameters, and billions that compute a token, as the publishers count them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config, total, active = PUBLISHED[name]
    architecture = parse_architecture(config, f"{name}/config.json")
    assert isinstance(architecture, DecoderArchitecture), architecture.describe_implementation()
    assert architecture.num_parameters / 1e9 == pytest.approx(total, rel=0.008)
    tables = architecture.num_parameters - _in_blocks(architecture)
    assert (architecture.block_matrices + tables) / 1e9 == pytest.approx(active, rel=0.04)


def _in_blocks(architecture: DecoderArchitecture) -> int:
    parameters = meta_model(architecture).named_parameters()
    return sum(p.numel() for name, p in parameters if name.startswith("model.layers.") and p.requires_grad)


@pytest.mark.parametrize("name", ["qwen2_moe in some layers", "glm4_moe", "olmoe"])
def test_active_elements_of_the_parameters_are_those_of_the_blocks(name: str) -> None:
    architecture = parse_decoder_architecture(hf_config(name).to_dict())
    blocks = [parameter for block in meta_model(architecture).blocks for parameter in block.parameters()]
    assert sum(architecture.active_elements(tuple(p.shape)) for p in blocks) == architecture.block_matrices
    shared = [math.prod(p.shape) for p in blocks if p.ndim == 3]
    assert architecture.block_matrices <= sum(p.numel() for p in blocks if p.ndim > 1) - sum(shared) / 2


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**hf_config(name).to_dict(), **changes}


@pytest.mark.parametrize(
    ("name", "key", "alias"),
    [
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("mixtral", "num_local_experts", "num_experts"),
        ("glm4_moe", "n_routed_experts", "num_local_experts"),
    ],
)
def test_both_names_of_the_number_of_experts(name: str, key: str, alias: str) -> None:
    """transformers 5 writes the attribute's name of some types, which is another one than in published files."""
    config = {key: value for key, value in config_of(name).items() if key not in (alias, "n_group", "topk_group")}
    count = config.pop(key, None) or parse_decoder_architecture(config_of(name)).experts.num_experts
    expected = parse_decoder_architecture({**config, key: count})
    assert expected.experts is not None and expected.experts.num_experts == count
    assert parse_decoder_architecture({**config, alias: count}) == expected
    assert parse_decoder_architecture({**config, key: count, alias: count}) == expected
    with pytest.raises(UserError, match=rf"^x: {key} is {count}; {alias}, another name of it, is {count + 2}; remove"):
        parse_decoder_architecture({**config, key: count, alias: count + 2}, "x")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "more experts than there are": ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7; .* 6 experts"),
    "no expert of a token": ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    "layers that are no list": ("qwen2_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1; it is a list"),
    "no period": ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    "no width": ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
    "groups that do not divide": ("glm4_moe", {"n_group": 3}, "n_group is 3; it must divide .* = 8"),
    "groups of one": ("glm4_moe", {"n_group": 8}, "n_group is 8; .* groups of at least two"),
    "too many groups": ("glm4_moe", {"topk_group": 5}, "topk_group is 5; it must be at most n_group = 4"),
    "too few groups": ("glm4_moe", {"topk_group": 1}, "num_experts_per_tok is 3; a token can choose among 2"),
    "a text": ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
    "misspelt": ("qwen3_moe", {"norm_topk_probs": True}, "norm_topk_probs is True.*did you mean norm_topk_prob"),
    "a factor of others": ("mixtral", {"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    "noise": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; .*set model.dropout to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    name, change, expected = REFUSED[case]
    with pytest.raises(UserError, match=rf"^x: .*{expected}") as caught:
        parse_architecture(config_of(name, **change), "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("olmoe", {"clip_qkv": 8.0}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": 3}),
    ],
)
def test_transformers_computes_what_the_decoder_does_not(name: str, change: dict[str, Any]) -> None:
    key = next(iter(change))
    architecture = parse_architecture(config_of(name, **change), "x")
    assert architecture.implementation == "transformers" and key in architecture.describe_implementation()
    with pytest.raises(UserError, match=rf"{key} is .*; or set model\.implementation to transformers"):
        parse_architecture(config_of(name, **change), "x", "native")


def test_noise_of_the_router_is_switched_off_like_dropout() -> None:
    noisy = config_of("mixtral", router_jitter_noise=0.1)
    quiet = with_settings(noisy, ModelConfig(dropout=0), "x")
    assert quiet["router_jitter_noise"] == 0
    assert parse_architecture(quiet, "x") == parse_decoder_architecture(config_of("mixtral"))


def test_keys_for_other_programs_are_named_and_have_no_effect() -> None:
    """As in files of DeepSeek's kin: each repeats what the type does anyway, or is a setting of training."""
    others = {"moe_layer_freq": 1, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "ep_size": 1}
    config = config_of("dots1", **others)
    assert parse_decoder_architecture(config, "x") == parse_decoder_architecture(config_of("dots1"))
    assert unread_keys(config) == list(others)
    with pytest.raises(UserError, match="mixture of experts"):
        parse_decoder_architecture(config_of("llama", moe_layer_freq=1), "x")


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "dots1"])
def test_the_coefficient_of_the_load_balancing_loss_is_a_known_key(name: str) -> None:
    config = config_of(name, router_aux_loss_coef=0.25)
    experts = parse_decoder_architecture(config).experts
    assert experts is not None and experts.aux_loss_coef == 0.25 and unread_keys(config) == []


def test_layers_without_experts_make_a_dense_model() -> None:
    dense = parse_decoder_architecture(config_of("qwen3_moe", mlp_only_layers=[0, 1, 2]))
    assert dense.experts is None
    like_qwen3 = config_of("qwen3", head_dim=16, tie_word_embeddings=False)
    assert dense.num_parameters == parse_decoder_architecture(like_qwen3).num_parameters
