"""Mixtures of experts against Megatron-Core itself: what its model saves, and what it makes of what we write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retemper.checkpoint_convert import megatron_export, megatron_import, megatron_mixture
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.verify import find_damage

pytest.importorskip("megatron.core", reason="needs megatron-core, which `make setup` installs where there is a wheel")

import megatron_models as mm
from megatron_models import TOKENS, VOCAB_SIZE, random_hf_folder, saved, transformers_logits
from tiny_models import read_folder

from retemper.engine.parallel.process_group import Ranks

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN: dict[str, Any] = {"num_experts": 6, "moe_intermediate_size": 24}
SIGMOID: dict[str, Any] = {
    "n_routed_experts": 6,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", **QWEN, "norm_topk_prob": True},
    "qwen2_moe": {"model_type": "qwen2_moe", **QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
    # As 57B-A14B and 30B-A3B, but with a layer without experts.
    "qwen2_moe, dense layer": {
        "model_type": "qwen2_moe",
        **QWEN,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen3_moe, dense layer": {"model_type": "qwen3_moe", **QWEN, "norm_topk_prob": False, "mlp_only_layers": [0]},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5},
    "dots1": {**SIGMOID, "model_type": "dots1", "sliding_window": None},
    "dots1, groups": {
        **SIGMOID,
        "model_type": "dots1",
        "sliding_window": None,
        "first_k_dense_replace": 0,
        "num_experts_per_tok": 4,
        "n_group": 3,
        "topk_group": 2,
    },
    "glm4_moe": {
        **SIGMOID,
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe, no norm": {
        **SIGMOID,
        "model_type": "glm4_moe",
        "first_k_dense_replace": 2,
        "attention_bias": False,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.25,
    },
}
SETTINGS: dict[str, dict[str, Any]] = {name: {**COMMON, **family} for name, family in FAMILIES.items()}


def quiet(line: str) -> None:
    """Ignore what is said."""


def test_the_norm_before_a_router_keeps_its_key_with_transformer_engine() -> None:
    """The specification with TransformerEngine cannot be built here, but its description says where the norm is."""
    has_norm, renamed = mm.keys_with_transformer_engine(num_experts=6)
    assert has_norm and not any(key.startswith("pre_mlp_layernorm") for key in renamed)
    assert not mm.keys_with_transformer_engine(num_experts=None)[0]


@pytest.mark.parametrize(
    ("family", "norm_as_with_te"), [*((family, True) for family in FAMILIES), ("qwen2_moe, dense layer", False)]
)
def test_what_megatron_saves(one_rank: Ranks, tmp_path: Path, family: str, norm_as_with_te: bool) -> None:
    settings = SETTINGS[family]
    args = mm.args_of(settings)
    with mm.megatron_on_cpu():
        model = mm.gpt_model(args, 128, norm_as_with_te)
        saved(model, tmp_path / "megatron", args)
        theirs = mm.logits(model, TOKENS)
    # From what Megatron has stored, and from the model's config.
    megatron_import.convert(tmp_path / "megatron", tmp_path / "all", say=quiet)
    torch.testing.assert_close(transformers_logits(tmp_path / "all"), theirs, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "all" / "config.json").read_text())["model_type"] == settings["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    given = tmp_path / "config.json"
    megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", config=given, verify=True, say=quiet)
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), theirs[..., :VOCAB_SIZE], rtol=0, atol=1e-5)


@pytest.mark.parametrize("metadata", [{"non_homogeneous_layers": True}, {"singleton_local_shards": True}], ids=str)
def test_what_megatron_saves_layer_by_layer(one_rank: Ranks, tmp_path: Path, metadata: dict[str, Any]) -> None:
    args = mm.args_of(SETTINGS["qwen2_moe"])
    with mm.megatron_on_cpu():
        model = mm.gpt_model(args, 128)
        saved(model, tmp_path / "megatron", args, metadata)
        theirs = mm.logits(model, TOKENS)
    megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", say=quiet)
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "per_layer"), [*((family, False) for family in FAMILIES), ("qwen2_moe", True), ("mixtral", True)]
)
def test_megatron_loads_what_we_write(one_rank: Ranks, tmp_path: Path, family: str, per_layer: bool) -> None:
    folder = random_hf_folder(tmp_path / "hf", SETTINGS[family])
    megatron_export.convert(tmp_path / "megatron", hf=str(folder), per_layer=per_layer, say=quiet)
    release = tmp_path / "megatron" / "release"
    with mm.megatron_on_cpu():
        common = mm.dist_checkpointing.load_common_state_dict(str(release))
        model = mm.gpt_model(common["args"], common["args"].padded_vocab_size)
        mm.load(model, release, common["content_metadata"])
        theirs = mm.logits(model, TOKENS)
    torch.testing.assert_close(theirs[..., :VOCAB_SIZE], transformers_logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_a_checkpoint_for_the_trainer(one_rank: Ranks, tmp_path: Path, family: str) -> None:
    """Every bit from Megatron to a checkpoint and back to Megatron."""
    args = mm.args_of(SETTINGS[family])
    with mm.megatron_on_cpu():
        saved(mm.gpt_model(args, 128), tmp_path / "megatron", args)
    megatron_import.convert(tmp_path / "megatron", tmp_path / "checkpoint", format="checkpoint", say=quiet)
    assert find_damage(tmp_path / "checkpoint")[1] == []
    megatron_export.convert(tmp_path / "again", checkpoint=tmp_path / "checkpoint", say=quiet)
    with mm.megatron_on_cpu():
        before, after = mm.gpt_model(args, 128), mm.gpt_model(args, 128)
        for parameter in after.parameters():
            torch.nn.init.zeros_(parameter)
        mm.load(after, tmp_path / "again" / "release")
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_biases_of_the_choice_stay_in_fp32(one_rank: Ranks, tmp_path: Path) -> None:
    """As in Megatron and transformers: rounded ones would choose other experts."""
    folder = random_hf_folder(tmp_path / "hf", SETTINGS["dots1"])
    megatron_export.convert(tmp_path / "megatron", hf=str(folder), dtype="bfloat16", say=quiet)
    megatron_import.convert(tmp_path / "megatron", tmp_path / "back", dtype="bfloat16", say=quiet)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor if name in biases else tensor.bfloat16()
        assert torch.equal(after[name], expected) and after[name].dtype == expected.dtype, name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def megatron_on_two_ranks(
    ranks: Ranks, settings: dict[str, Any], axis: str, written: str, output: str
) -> dict[str, Any]:
    """One rank's part of the test below."""
    args = mm.args_of(settings)
    with mm.megatron_on_cpu(**{axis: 2}):
        model = mm.gpt_model(args, 256)
        saved(model, Path(output), args)
        own = mm.logits(model, TOKENS)
        mm.load(model, Path(written))
        loaded = mm.logits(model, TOKENS)
    return {"own": own, "loaded": loaded}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor_parallel", "expert_parallel"])
def test_two_ranks(two_ranks: Any, tmp_path: Path, axis: str) -> None:
    """Every rank holds half of the inner features of every expert, or half of the experts."""
    settings = SETTINGS["qwen2_moe"]
    folder = random_hf_folder(tmp_path / "hf", settings)
    megatron_export.convert(tmp_path / "ours", hf=str(folder), tensor_parallel=2, say=quiet)
    (tmp_path / "theirs").mkdir()
    written, output = str(tmp_path / "ours" / "release"), str(tmp_path / "theirs")
    results = two_ranks.run(megatron_on_two_ranks, settings, axis, written, output)
    expected = transformers_logits(folder)
    megatron_import.convert(tmp_path / "theirs", tmp_path / "back", say=quiet)
    back = transformers_logits(tmp_path / "back")
    for result in results:
        torch.testing.assert_close(result["loaded"][..., :VOCAB_SIZE], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(result["own"], back, rtol=0, atol=1e-5)


# Settings that leave every tensor as it is and change what the model computes.
UNSEEN: dict[str, dict[str, Any]] = {
    "scale": {"moe_router_topk_scaling_factor": 2.5},
    "sigmoid": {"moe_router_enable_expert_bias": False, "moe_router_score_function": "sigmoid"},
    "groups": {"moe_router_group_topk": 1, "moe_router_num_groups": 3},
    "capacity": {"moe_expert_capacity_factor": 0.5, "moe_router_load_balancing_type": "aux_loss"},
}
# The same for settings that a config can express, but the given one has another value.
OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "k": ("qwen3_moe", {"moe_router_topk": 3}),
    "order": ("qwen3_moe", {"moe_router_pre_softmax": True}),
    "factor": ("dots1", {"moe_router_topk_scaling_factor": 1.5}),
    "groups": ("dots1, groups", {"moe_router_num_groups": None, "moe_router_group_topk": None}),
}


def changed_model(tmp_path: Path, settings: dict[str, Any], change: dict[str, Any]) -> None:
    """Save a model with a setting that changes its logits."""
    args = mm.args_of(settings)
    vars(args).update(change)
    with mm.megatron_on_cpu():
        model, usual = mm.gpt_model(args, 128, **change), mm.gpt_model(mm.args_of(settings), 128)
        usual.load_state_dict(model.state_dict(), strict=True)
        assert (mm.logits(model, TOKENS) - mm.logits(usual, TOKENS)).abs().max() > 1e-3
        saved(model, tmp_path / "megatron", args)
    (tmp_path / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("case", "given"), [*((case, True) for case in UNSEEN), ("groups", False)])
def test_a_setting_that_no_tensor_betrays(one_rank: Ranks, tmp_path: Path, case: str, given: bool) -> None:
    changed_model(tmp_path, SETTINGS["qwen3_moe"], UNSEEN[case])
    name, value = next(iter(UNSEEN[case].items()))
    config = tmp_path / "config.json" if given else None
    with pytest.raises(UserError, match=f"its args have {name} {value!r}, supported"):
        megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", config=config, say=quiet)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("case", OTHER)
def test_a_config_with_another_router(one_rank: Ranks, tmp_path: Path, case: str) -> None:
    family, change = OTHER[case]
    changed_model(tmp_path, SETTINGS[family], change)
    name, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"its args have {name} {value!r}, --config has"):
        megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", config=tmp_path / "config.json", say=quiet)
    # Without a config, the stored settings say how it routes.
    megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", say=quiet)
    with mm.megatron_on_cpu():
        args = mm.args_of(SETTINGS[family])
        vars(args).update(change)
        theirs = mm.logits(mm.gpt_model(args, 128), TOKENS)
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), theirs, rtol=0, atol=1e-5)


def test_what_megatron_does_where_nothing_is_said() -> None:
    """The value that stands for our mixture is Megatron's default."""
    fields = {field.name: field.default for field in dataclasses.fields(mm.TransformerConfig)}
    ours = {**megatron_mixture.FIXED, **megatron_mixture.SOFTMAX_ONLY, "moe_router_score_function": "softmax"}
    assert {name: fields[name] for name in ours} == ours
    assert (fields["moe_router_topk"], fields["moe_router_pre_softmax"], fields["moe_layer_freq"]) == (2, False, 1)


@pytest.mark.parametrize("every", [2, [0, 1, 1]], ids=str)
def test_layers_with_experts(one_rank: Ranks, tmp_path: Path, every: Any) -> None:
    """Megatron counts from the first layer, and transformers from the n-th."""
    args = mm.args_of(SETTINGS["qwen3_moe"])
    args.moe_layer_freq = every
    with mm.megatron_on_cpu():
        model = mm.gpt_model(args, 128)
        saved(model, tmp_path / "megatron", args)
        theirs = mm.logits(model, TOKENS)
    megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", say=quiet)
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), theirs, rtol=0, atol=1e-5)
    # And back to Megatron, which computes the same.
    megatron_export.convert(tmp_path / "again", hf=str(tmp_path / "hf"), say=quiet)
    megatron_import.convert(tmp_path / "again", tmp_path / "back", say=quiet)
    assert read_folder(tmp_path / "back") == read_folder(tmp_path / "hf")
