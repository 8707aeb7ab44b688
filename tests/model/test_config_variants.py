"""Spellings and contradictions of config.json: either the model that transformers builds from it, or a refusal."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from retemper.engine.batch import Batch
from retemper.engine.errors import UserError
from retemper.engine.model.config_file import read_hf_config
from retemper.engine.model.config_keys import describe_unread, unread_keys
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.families import parse_decoder_architecture
from retemper.engine.model.family_table import FAMILIES
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.model.rope_settings import inverse_frequencies

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WITH_LENGTH = {**LLAMA3, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"sliding_window": 5, "use_sliding_window": True}


def config_of(family: str, change: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({"model_type": family, **SHAPE, **change})


def check_same_logits(config: dict[str, Any]) -> None:
    """Our decoder on the weights of a random model that transformers makes of the same config."""
    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    theirs._attn_implementation = "eager"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.3)
    state = model.state_dict()
    if theirs.tie_word_embeddings:
        del state["lm_head.weight"]
    decoder = Decoder(parse_decoder_architecture(config, "config.json"))
    decoder.load_state_dict(state, strict=True)
    tokens = torch.arange(40) * 7 % 61
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
        actual = decoder.logits(Batch.of_documents(tokens, [40]))
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


SAME = {
    "rope_scaling replaces a plain rope_parameters": ("qwen3", {"rope_parameters": DEFAULT, "rope_scaling": LINEAR}),
    "with the same theta": (
        "llama",
        {"rope_parameters": {**DEFAULT, "rope_theta": 5e5}, "rope_scaling": {**LINEAR, "rope_theta": 5e5}},
    ),
    "an empty rope_scaling": ("llama", {"rope_parameters": LINEAR, "rope_scaling": {}}),
    "no rope_scaling": ("mistral", {"rope_parameters": LINEAR, "rope_scaling": None, "sliding_window": None}),
    "type and rope_type": ("qwen2", {"rope_scaling": {**LINEAR, "type": "linear"}, "rope_theta": 5e5}),
    "theta in two places": ("llama", {"rope_theta": 5e5, "rope_parameters": {**DEFAULT, "rope_theta": 5e5}}),
    "theta outside": ("llama", {"rope_theta": 5e5, "rope_parameters": LINEAR}),
    "a whole float": ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16.0}}),
    "llama3 without a length": ("llama", {"rope_scaling": LLAMA3}),
    "llama3 with a length at the top": ("qwen2", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
    "swish": ("mistral", {"hidden_act": "swish"}),
    "yarn next to a plain rope_parameters": ("qwen3", {"rope_parameters": DEFAULT, "rope_scaling": YARN}),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "all layers windowed": ("qwen2", {**WINDOW, "max_window_layers": 0}),
    "windows from a layer": ("qwen3", {**WINDOW, "max_window_layers": 2}),
    "layer_types before max_window_layers": (
        "qwen2",
        {**WINDOW, "max_window_layers": 0, "layer_types": [FULL, SLIDING, FULL]},
    ),
    "a window that is switched off": ("qwen2", {"sliding_window": 5, "max_window_layers": 0}),
    "no window to switch on": ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}),
    "mistral with use_sliding_window": ("mistral", {**WINDOW, "layer_types": [SLIDING] * 3}),
    "no epsilon": ("llama", {"rms_norm_eps": 0.0}),
    "dtype before torch_dtype": ("llama", {"dtype": "float32", "torch_dtype": "bfloat16"}),
    "keys that change nothing": (
        "qwen2",
        {"pretraining_tp": 2, "chunk_size_feed_forward": 2, "temperature": 0.7, "attention_bias": True, "x_y": 1},
    ),
    "neutral keys of other architectures": (
        "llama",
        {"num_experts": 0, "logits_scaling": 1.0, "clip_qkv": None, "is_causal": True, "resid_pdrop": 0.0, "n_head": 4},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_means_what_transformers_means(case: str) -> None:
    family, change = SAME[case]
    check_same_logits(config_of(family, change))


REFUSED = {
    "an unknown type next to rope_parameters": (
        "qwen3",
        {"rope_parameters": DEFAULT, "rope_scaling": {**LINEAR, "rope_type": "proportional"}},
        "rope_type is 'proportional'",
    ),
    "two types that are known": (
        "llama",
        {"rope_parameters": {**DEFAULT, **LINEAR}, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_parameters next to it is",
    ),
    "a theta that rope_scaling would drop": (
        "llama",
        {"rope_parameters": {**DEFAULT, "rope_theta": 5e5}, "rope_scaling": LINEAR},
        "rope_parameters next to it is",
    ),
    "two scalings": (
        "llama",
        {"rope_parameters": WITH_LENGTH, "rope_scaling": LINEAR},
        "rope_parameters next to it is",
    ),
    "two types": ("llama", {"rope_scaling": {**LINEAR, "type": "dynamic"}}, "type is 'dynamic'; rope_type is 'linear'"),
    "two thetas": ("llama", {"rope_theta": 1e6, "rope_parameters": DEFAULT}, "rope_theta is 10000.0; rope_theta at"),
    "two lengths": (
        "llama",
        {"rope_scaling": WITH_LENGTH, "original_max_position_embeddings": 32},
        "original_max_position_embeddings is 16; original_max_position_embeddings at the top of the config is 32",
    ),
    "settings without a type": ("llama", {"rope_scaling": {"factor": 4.0}}, "factor is 4.0; it has no effect without"),
    "a misspelt setting": ("llama", {"rope_scaling": {**LINEAR, "facter": 2.0}}, "facter is 2.0; .* mean factor?"),
    "a setting of another type": ("llama", {"rope_scaling": {**WITH_LENGTH, "beta_fast": 32}}, "beta_fast is 32; "),
    "half a length": (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16.5}},
        "original_max_position_embeddings is 16.5",
    ),
    "settings by layer": ("qwen3", {"rope_parameters": {FULL: LINEAR}}, "full_attention is"),
    "a type that is a list": ("llama", {"rope_scaling": {"rope_type": ["linear"], "factor": 2}}, r"rope_type is \["),
    "a factor that is true": ("llama", {"rope_scaling": {**LINEAR, "factor": True}}, "factor is True"),
    "scaling that is false": ("llama", {"rope_scaling": False}, "rope_scaling is False"),
    "a length at the top alone": ("llama", {"original_max_position_embeddings": 32}, "has no effect with rope_type"),
    "a window of no use": ("llama", {"sliding_window": 5}, "sliding_window is 5; Llama models have no"),
    "layers of no window": ("llama", {"layer_types": [SLIDING] * 3}, "layer_types is"),
    "a window in some layers": ("mistral", {**WINDOW, "max_window_layers": 2}, "max_window_layers is 2"),
    "a window switched off": ("mistral", {**WINDOW, "use_sliding_window": False}, "use_sliding_window is False"),
    "windows without use": ("qwen2", {"sliding_window": 5, "layer_types": [SLIDING] * 3}, "layer_types is"),
    "a window of nothing": ("qwen2", {**WINDOW, "sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
    "text for a boolean": ("qwen2", {"use_sliding_window": "true"}, "use_sliding_window is 'true'"),
    "a number for a boolean": ("qwen2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    "a boolean for a number": ("qwen2", {**WINDOW, "max_window_layers": True}, "max_window_layers is True"),
    "text for a length": ("llama", {"max_position_embeddings": "x"}, "max_position_embeddings is 'x'"),
    "unknown layers": ("qwen2", {"layer_types": ["full"] * 3}, "layer_types is 'full'"),
    "biases that Mistral has not": ("mistral", {"attention_bias": True}, "attention_bias is True"),
    "biases in the MLP": ("qwen2", {"mlp_bias": True}, "mlp_bias is True"),
    "misspelt": ("llama", {"rope_thetta": 1e6}, "rope_thetta is 1000000.0; .* did you mean rope_theta?"),
    "another name": ("llama", {"num_kv_heads": 4}, "num_kv_heads is 4; .* is called num_key_value_heads"),
    "another epsilon": ("llama", {"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001; .* is called rms_norm_eps"),
    "attention both ways": ("llama", {"is_causal": False}, "is_causal is False"),
    "layers that differ": ("qwen3", {"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config is"),
    "experts": ("qwen2", {"num_experts": 8}, "num_experts is 8; .*mixture of experts"),
    "experts of another name": ("qwen2", {"moe_topk": 2}, "moe_topk is 2; .*mixture of experts"),
    "far too many parameters": (
        "llama",
        {"hidden_size": 2**20, "num_hidden_layers": 999, "num_attention_heads": 2**17},
        "hidden_size is 1048576; the sizes make",
    ),
    "9,999 layers": ("llama", {"hidden_size": 2**24, "num_hidden_layers": 9_999}, "num_hidden_layers is 9999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case: str) -> None:
    family, change, expected = REFUSED[case]
    with pytest.raises(UserError, match=rf"^models/x/config\.json: .*{expected}") as caught:
        parse_decoder_architecture(config_of(family, change), "models/x/config.json")
    assert "\n" not in str(caught.value)


NO_DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"head_dim": 128},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
}
"""Keys of classes whose defaults make no model, because heads do not divide the width, or values are missing."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_known(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    fields = {field.name for field in dataclasses.fields(config)}
    assert unread_keys({**config.to_dict(), **dict.fromkeys(fields)}) == []
    assert unread_keys(GenerationConfig._get_default_generation_params()) == []
    changes = {**dict.fromkeys(FAMILIES[family].dropouts.split(), 0.0), **NO_DEFAULTS.get(family, {})}
    assert parse_decoder_architecture({**config.to_dict(), **changes}).model_type == family


OTHERS = """
    Cohere DeepseekV3 Exaone4 Falcon Gemma2 Glm4Moe GptOss Granite Mixtral Olmoe Phi Phi3 Qwen2Moe Qwen3Moe Qwen3Next
    SmolLM3 StableLm Starcoder2
"""


@pytest.mark.parametrize("other", OTHERS.split())
def test_configs_of_other_architectures_are_no_llama(other: str) -> None:
    """What transformers' own classes for other models write is not taken for a Llama, whatever its sizes."""
    config = getattr(transformers, f"{other}Config")().to_dict()
    ours = {**SHAPE, "model_type": "llama", "hidden_act": "silu", "rope_parameters": None, "layer_types": None}
    with pytest.raises(UserError, match=r"config\.json: "):
        parse_decoder_architecture({**config, **ours}, "config.json")


def test_unknown_keys_are_errors_inline_and_notes_in_a_file(tmp_path: Path) -> None:
    config = config_of("llama", {"num_kv_heads": 2, "rope_thetta": 1e6, "tie_word_embedding": True, "zzz": 1, 7: 2})
    with pytest.raises(UserError) as caught:
        parse_decoder_architecture(config)
    assert str(caught.value).startswith("model.architecture: ") and "zzz, 7;" in str(caught.value)
    for wrong, right in (
        ("num_kv_heads", "num_key_value_heads"),
        ("rope_thetta", "rope_theta"),
        ("tie_word_embedding", "tie_word_embeddings"),
    ):
        assert f"{wrong} (did you mean {right}?)" in str(caught.value)
    published = {**config_of("llama", {}), "dual_chunk_attention_config": {"chunk_size": 8}, "seq_length": 9}
    (tmp_path / "config.json").write_text(json.dumps(published))
    read = read_hf_config(tmp_path)
    architecture = parse_decoder_architecture(read, "config.json")
    assert describe_unread(architecture.unread_keys(read), "x") == [
        "note: x has keys without effect, which are not read: dual_chunk_attention_config, seq_length"
    ]


def test_hostile_config_files_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, 10**9)
    with pytest.raises(UserError, match=r"config\.json: 1,000,000,000 bytes, at most"):
        read_hf_config(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"config\.json: not a regular file"):
        read_hf_config(tmp_path)
    path.unlink()
    path.write_text('{"rope_theta": 1, "vocab_size": 5, "vocab_size": 5, "rope_theta": 2}')
    with pytest.raises(UserError, match=r"config\.json: rope_theta occurs twice"):
        read_hf_config(tmp_path)
    path.write_text('{"vocab_size": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_hf_config(tmp_path)
    deep: dict[str, Any] = {}
    deep["rope_scaling"] = deep
    with pytest.raises(UserError, match=r"model\.architecture: nested more than 50 levels"):
        read_hf_config(deep)


@pytest.mark.parametrize(
    ("present", "expected"), [("adapter_config.json", "PEFT adapter"), ("params.json", "publisher's own layout")]
)
def test_folders_of_something_else_than_a_model(tmp_path: Path, present: str, expected: str) -> None:
    (tmp_path / present).write_text("{}")
    with pytest.raises(UserError, match=expected):
        read_hf_config(tmp_path)


def test_the_length_of_a_family_stands_in_for_the_original_one() -> None:
    """Without max_position_embeddings, transformers takes the default of the class."""
    config = config_of("llama", {"rope_scaling": LLAMA3})
    del config["max_position_embeddings"]
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"].from_dict(copy.deepcopy(config)))
    ours = torch.tensor(inverse_frequencies(parse_decoder_architecture(config).ropes[0]))
    torch.testing.assert_close(ours, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", ["auto", "native", "transformers"])
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"logits_scaling": 8.0}),
        ("mistral", {"embedding_multiplier": 2}),
        ("qwen2", {"final_logit_softcapping": 30.0}),
    ],
)
def test_factors_that_the_model_does_not_know_are_refused_everywhere(
    family: str, change: dict[str, Any], implementation: Any
) -> None:
    """transformers keeps them in the config and ignores them."""
    with pytest.raises(UserError, match=next(iter(change))):
        parse_architecture(config_of(family, change), "x", implementation)


def test_factors_that_the_model_knows_are_read_by_transformers() -> None:
    config = config_of("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.1})
    assert parse_architecture(config, "x", "transformers").implementation == "transformers"
