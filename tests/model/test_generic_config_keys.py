"""Every key of the config of a model that transformers computes is read, known to change nothing, noted or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_table import tiny_config

from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.model.implementations import architecture_of, parse_architecture

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"rope_theta": 1e6, "rope_scaling": None, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16"},
    "deepseek_v3": {
        "ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "rope_theta": 1e4,
        "topk_method": "noaux_tc", "aux_loss_alpha": 0.001, "seq_aux": True, "attention_dropout": 0.0,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "gpt_oss": {"initial_context_length": 4096, "experts_per_token": 2, "swiglu_limit": 7.0, "rope_theta": 150000},
    "mixtral": {"router_jitter_noise": 0.0, "router_aux_loss_coef": 0.02},
}  # fmt: skip
"""Keys of published files, some of which are for other programs."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "number": ("qwen3_moe", {"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    "flag": ("mixtral", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
    "state space": ("mixtral", {"mamba_d_state": 16}, "mamba_d_state is 16.*state-space"),
    "misspelt": ("qwen3_moe", {"norm_topk_probs": True}, "norm_topk_probs is True.*did you mean norm_topk_prob"),
    "misspelt theta": ("mixtral", {"rope_thetta": 1e6}, "rope_thetta.*did you mean"),
    "experts of a dense model": ("nemotron", {"num_experts": 8}, "num_experts is 8.*mixture of experts"),
}


def config_of(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_config(model_type).to_dict(), **changes}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_files_are_read(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(model_type, PUBLISHED[model_type])))
    assert architecture_of(tmp_path, "transformers").implementation == "transformers"


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_would_change_the_computation_are_refused(case: str) -> None:
    model_type, change, expected = REFUSED[case]
    with pytest.raises(UserError, match=rf"^models/x/config\.json: .*{expected}") as caught:
        parse_architecture(config_of(model_type, change), "models/x/config.json", "transformers")
    assert "\n" not in str(caught.value)


def test_neutral_values_are_no_problem() -> None:
    neutral = {"logits_scaling": 1.0, "attn_logit_softcapping": None, "mamba_d_state": 0, "use_rope": True}
    parse_architecture(config_of("qwen3_moe", neutral), "x", "transformers")


def test_unknown_keys_are_errors_inline_and_notes_in_a_file() -> None:
    config = config_of("qwen3_moe", {"zzz": 1, "ep_size": 1})
    with pytest.raises(UserError, match=r"^model.architecture: .*unknown settings: zzz, ep_size"):
        architecture_of(config)
    assert parse_architecture(config, "config.json").unread_keys(config) == ["zzz", "ep_size"]
    assert parse_architecture(config, "config.json").unread_keys(config_of("qwen3_moe", {"rope_theta": 1e6})) == []


def test_an_option_changes_one_entry_of_a_file(tmp_path: Path) -> None:
    """The other entries that only this type reads stay."""
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3_moe", {"ep_size": 1})))
    (tmp_path / "run.yaml").write_text(
        f"run_folder: x\nmodel: {{architecture: {tmp_path}}}\ndata: {{train: [{{path: y}}]}}\ntraining: "
        "{train_tokens: 10, sequence_length: 1, global_batch_size: 1, micro_batch_size: 1}\n"
    )
    changed = parse_config(["--config", str(tmp_path / "run.yaml"), "--model.architecture.hidden_size", "32"])
    assert changed.model.architecture == {**json.loads(json.dumps(config_of("qwen3_moe", {}))), "hidden_size": 32}
