"""``model.dropout`` sets every dropout of a config to 0, stated or by default of the type, and nothing else."""

from __future__ import annotations

import pytest
import torch
from model_table import tiny_config, tiny_model
from transformers import AutoConfig

from retemper.engine.config.settings import ModelConfig
from retemper.engine.errors import UserError
from retemper.engine.model.changed_config import with_settings
from retemper.engine.model.implementations import parse_architecture

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS = {
    "gpt2 by default": (
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        "transformers",
    ),
    "llama": ({"model_type": "llama", **SIZES, "attention_dropout": 0.1}, "native"),
    "seed_oss by default": ({"model_type": "seed_oss", **SIZES, "num_key_value_heads": 2, "head_dim": 16}, "native"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_dropout_is_refused_unless_it_is_switched_off(name: str):
    config, implementation = CONFIGS[name]
    with pytest.raises(UserError, match=r"set model\.dropout to 0"):
        parse_architecture(config, "config.json")
    changed = with_settings(config, ModelConfig(dropout=0.0), "config.json")
    assert parse_architecture(changed, "config.json").implementation == implementation
    assert with_settings(changed, ModelConfig(dropout=0.0), "config.json") == changed
    theirs = AutoConfig.for_model(**changed).to_dict()
    assert not [key for key, value in theirs.items() if "drop" in key and "summary" not in key and value]
    assert {key: value for key, value in changed.items() if "drop" not in key} == {
        key: value for key, value in config.items() if "drop" not in key
    }


def test_the_threshold_of_phimoe_stays():
    """Its router masks experts by ``router_jitter_noise`` in evaluation too: with 0 transformers' logits are others."""
    config = tiny_config("phimoe")
    config.router_jitter_noise = 0.2
    written = config.to_dict()
    assert written["router_jitter_noise"] > 0
    assert parse_architecture(written, "config.json").implementation == "transformers"
    assert with_settings(written, ModelConfig(dropout=0.0), "config.json") == written
    tokens = torch.arange(12)[None]
    model = tiny_model(config).eval()
    other = tiny_model(AutoConfig.for_model(**{**written, "router_jitter_noise": 0.0})).eval()
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, other(tokens).logits)
    noisy = {**written, "input_jitter_noise": 0.01}
    with pytest.raises(UserError, match=r"input_jitter_noise is 0.01.*set model\.dropout to 0"):
        parse_architecture(noisy, "config.json")
    assert with_settings(noisy, ModelConfig(dropout=0.0), "config.json") == {**written, "input_jitter_noise": 0.0}
