"""Against Megatron-Core itself: what its model saves, and what it makes of what we write. On the CPU."""

from __future__ import annotations

import dataclasses
import enum
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from retemper.checkpoint_convert import megatron_config, megatron_export, megatron_import
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.verify import find_damage

pytest.importorskip("megatron.core", reason="needs megatron-core, which `make setup` installs where there is a wheel")

import megatron_models as mm
from megatron_models import TOKENS, VOCAB_SIZE, random_hf_folder, saved, transformers_logits

from retemper.engine.parallel.process_group import Ranks

COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 8},
    "llama, biases, long": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 8},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 16},
}
SETTINGS = {
    name: {**COMMON, **family, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 5000.0}
    for name, family in FAMILIES.items()
}


class Backend(enum.Enum):
    """Stands for the enumerations among Megatron-LM's settings, which we do not know."""

    AUTO = 5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_megatron_saves(one_rank: Ranks, tmp_path: Path, family: str) -> None:
    settings = SETTINGS[family]
    args = mm.args_of(settings, attention_backend=Backend.AUTO, padded_vocab_size=128)
    with mm.megatron_on_cpu():
        model = mm.gpt_model(args, 128)
        saved(model, tmp_path / "megatron", args)
        theirs = mm.logits(model, TOKENS)
    # From what Megatron has stored: it does not say how many rows are padding.
    megatron_import.convert(tmp_path / "megatron", tmp_path / "all", say=lambda line: None)
    torch.testing.assert_close(transformers_logits(tmp_path / "all"), theirs, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == (settings["model_type"], 128)
    # And from the model's config.
    (tmp_path / "config.json").write_text(json.dumps(settings))
    said: list[str] = []
    megatron_import.convert(
        tmp_path / "megatron", tmp_path / "hf", config=tmp_path / "config.json", verify=True, say=said.append
    )
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), theirs[..., :VOCAB_SIZE], rtol=0, atol=1e-5)
    assert "cut 31 rows of padding from the vocabulary of 128" in said


@pytest.mark.parametrize("metadata", [{"non_homogeneous_layers": True}, {"singleton_local_shards": True}], ids=str)
def test_what_megatron_saves_layer_by_layer(one_rank: Ranks, tmp_path: Path, metadata: dict[str, Any]) -> None:
    args = mm.args_of(SETTINGS["llama"])
    with mm.megatron_on_cpu():
        model = mm.gpt_model(args, 128)
        saved(model, tmp_path / "megatron", args, metadata)
        theirs = mm.logits(model, TOKENS)
    megatron_import.convert(tmp_path / "megatron" / "iter_0000007", tmp_path / "hf", say=lambda line: None)
    torch.testing.assert_close(transformers_logits(tmp_path / "hf"), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per layer"])
def test_megatron_loads_what_we_write(one_rank: Ranks, tmp_path: Path, family: str, per_layer: bool) -> None:
    folder = random_hf_folder(tmp_path / "hf", SETTINGS[family])
    megatron_export.convert(tmp_path / "megatron", hf=str(folder), per_layer=per_layer, say=lambda line: None)
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    release = tmp_path / "megatron" / "release"
    with mm.megatron_on_cpu():
        assert mm.dist_checkpointing.check_is_distributed_checkpoint(str(release))
        common = mm.dist_checkpointing.load_common_state_dict(str(release))
        model = mm.gpt_model(common["args"], common["args"].padded_vocab_size)
        mm.load(model, release, common["content_metadata"])
        theirs = mm.logits(model, TOKENS)
        padding = model.embedding.word_embeddings.weight[VOCAB_SIZE:]
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    torch.testing.assert_close(theirs[..., :VOCAB_SIZE], transformers_logits(folder), rtol=0, atol=1e-5)
    assert padding.shape[0] == 31 and not padding.any()


def megatron_on_two_ranks(ranks: Ranks, settings: dict[str, Any], written: str, output: str) -> dict[str, Any]:
    """One rank's part of the test below."""
    args = mm.args_of(settings)
    with mm.megatron_on_cpu(tensor_parallel=2):
        model = mm.gpt_model(args, 256)
        saved(model, Path(output), args)
        own = mm.logits(model, TOKENS)
        mm.load(model, Path(written))
        loaded = mm.logits(model, TOKENS)
    return {"own": own, "loaded": loaded}


@pytest.mark.slow
def test_two_tensor_parallel_ranks(two_ranks: Any, tmp_path: Path) -> None:
    """Every rank holds half of the groups, of gate and up, and of the vocabulary."""
    settings = SETTINGS["llama"]
    folder = random_hf_folder(tmp_path / "hf", settings)
    megatron_export.convert(tmp_path / "ours", hf=str(folder), tensor_parallel=2, say=lambda line: None)
    (tmp_path / "theirs").mkdir()
    results = two_ranks.run(megatron_on_two_ranks, settings, str(tmp_path / "ours/release"), str(tmp_path / "theirs"))
    expected = transformers_logits(folder)
    megatron_import.convert(tmp_path / "theirs", tmp_path / "back", say=lambda line: None)
    back = transformers_logits(tmp_path / "back")
    for result in results:
        torch.testing.assert_close(result["loaded"][..., :VOCAB_SIZE], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(result["own"], back, rtol=0, atol=1e-5)


def test_a_checkpoint_for_the_trainer(one_rank: Ranks, tmp_path: Path) -> None:
    args = mm.args_of(SETTINGS["qwen3"])
    with mm.megatron_on_cpu():
        saved(mm.gpt_model(args, 128), tmp_path / "megatron", args)
    megatron_import.convert(tmp_path / "megatron", tmp_path / "checkpoint", format="checkpoint", say=lambda line: None)
    assert find_damage(tmp_path / "checkpoint")[1] == []
    megatron_export.convert(tmp_path / "again", checkpoint=tmp_path / "checkpoint", say=lambda line: None)
    with mm.megatron_on_cpu():
        before, after = mm.gpt_model(args, 128), mm.gpt_model(args, 128)
        for parameter in after.parameters():
            torch.nn.init.zeros_(parameter)
        mm.load(after, tmp_path / "again" / "release")
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_megatron_takes_another_padding(one_rank: Ranks, tmp_path: Path) -> None:
    folder = random_hf_folder(tmp_path / "hf", SETTINGS["llama"])
    megatron_export.convert(tmp_path / "out", hf=str(folder), make_vocab_size_divisible_by=1, say=lambda line: None)
    with mm.megatron_on_cpu():
        model = mm.gpt_model(mm.args_of(SETTINGS["llama"]), 128)
        mm.load(model, tmp_path / "out" / "release")
        theirs = mm.logits(model, TOKENS)
    torch.testing.assert_close(theirs[..., :VOCAB_SIZE], transformers_logits(folder), rtol=0, atol=1e-5)


# Settings that leave every tensor as it is and change what the model computes.
UNSEEN: dict[str, Any] = {
    "rotary_interleaved": True,
    "no_rope_freq": 3,
    "softmax_type": "off-by-one",
    "softmax_scale": 0.7,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 0.25,
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("given", [True, False], ids=["config", "no config"])
def test_a_setting_that_no_tensor_betrays(one_rank: Ranks, tmp_path: Path, name: str, given: bool) -> None:
    settings, value = SETTINGS["llama"], UNSEEN[name]
    args = mm.args_of(settings, **{name: value})
    with mm.megatron_on_cpu():
        model, usual = mm.gpt_model(args, 128, **{name: value}), mm.gpt_model(args, 128)
        usual.load_state_dict(model.state_dict(), strict=True)
        assert (mm.logits(model, TOKENS) - mm.logits(usual, TOKENS)).abs().max() > 1e-3
        saved(model, tmp_path / "megatron", args)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = tmp_path / "config.json" if given else None
    with pytest.raises(UserError, match=f"its args have {name} {value!r}, supported"):
        megatron_import.convert(tmp_path / "megatron", tmp_path / "hf", config=config, say=lambda line: None)
    assert not (tmp_path / "hf").exists()


def test_what_megatron_does_where_nothing_is_said() -> None:
    """The value that stands for our decoder is Megatron's default, but for these that its option must turn on."""
    ours = {"normalization": "RMSNorm"}
    fields = {field.name: field.default for field in dataclasses.fields(mm.TransformerConfig)}
    names = {"num_experts": "num_moe_experts", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
    of_the_model = {"position_embedding_type", "rotary_percent", "swiglu", "squared_relu", "quick_geglu"}
    for name, value in megatron_config._FIXED.items():
        if name not in of_the_model:
            assert ours.get(name, fields[names.get(name, name)]) == value, name


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_windows(one_rank: Ranks, tmp_path: Path, first: int) -> None:
    """Megatron, started with what we advise, has the windows of transformers, also where only some layers have one."""
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": first}
    folder = random_hf_folder(tmp_path / "hf", {**SETTINGS["qwen2"], **windows})
    said: list[str] = []
    megatron_export.convert(tmp_path / "megatron", hf=str(folder), say=said.append)
    [advice] = [line for line in said if "--window-size" in line] or [""]
    assert bool(advice) == (first < 3)
    options = shlex.split(advice)
    release = tmp_path / "megatron" / "release"
    with mm.megatron_on_cpu():
        args = mm.dist_checkpointing.load_common_state_dict(str(release))["args"]
        if first < 3:
            before, after = options[options.index("--window-size") + 1].split(",")
            assert (int(before), int(after)) == args.window_size
        if 0 < first < 3:
            # As Megatron-LM's moe_freq_type does, after it has seen that there is nothing but such signs.
            pattern = options[options.index("--window-attn-skip-freq") + 1]
            assert set(pattern) <= set(",0123456789[]()+*") and eval(pattern) == args.window_attn_skip_freq
        model = mm.gpt_model(args, args.padded_vocab_size)
        mm.load(model, release)
        theirs = mm.logits(model, TOKENS)
    expected = transformers_logits(folder)
    torch.testing.assert_close(theirs[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-5)
    # And back: nothing to say where both agree, a line where they do not.
    config = json.loads((folder / "config.json").read_text())
    said.clear()
    megatron_import.convert(tmp_path / "megatron", tmp_path / "back", config=folder, say=said.append)
    assert not any("sliding window" in line for line in said)
    (tmp_path / "other.json").write_text(json.dumps({**config, "sliding_window": 7}))
    megatron_import.convert(tmp_path / "megatron", tmp_path / "o", config=tmp_path / "other.json", say=said.append)
    differs = f"the sliding window of layer {first} is 7 in config.json, which is used; the checkpoint's args have 6"
    assert (differs in said) == (first < 3)
