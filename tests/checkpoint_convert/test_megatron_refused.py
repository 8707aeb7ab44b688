"""Megatron checkpoints that are damaged, hostile, or of models that one side has not: one line, and nothing is left."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron_by_hand import by_hand, layer_by_layer, quiet_from, quiet_to, save_megatron, save_models
from mixture_folders import save_mixture
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, Command, assert_refused, edit_json, read_folder
from transformers import AutoConfig, AutoModelForCausalLM
from wrapped_models import save_wrapped

from retemper.checkpoint_convert import from_megatron, to_megatron
from retemper.checkpoint_convert.megatron_args import read_args
from retemper.engine.weights.dcp_metadata import read_metadata

Run = Callable[..., Command]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders; not to be changed."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def megatron(models: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of the Llama model to spoil."""
    return save_megatron(tmp_path / "megatron", by_hand(models["llama"], padded=128))


@pytest.fixture
def refuse(run: Run, models: dict[str, Path], tmp_path: Path) -> Callable[..., None]:
    """Runs from_megatron, which must refuse and leave nothing."""

    def refused(
        megatron: Path, *fragments: str, config: Path | None = models["llama"], options: Sequence[str] = ()
    ) -> None:
        before = sorted(tmp_path.iterdir())
        given = ["--config", config] if config is not None else []
        command = run(from_megatron, "--megatron", megatron, "--output", tmp_path / "output", *given, *options)
        assert_refused(command, *fragments)
        assert sorted(tmp_path.iterdir()) == before

    return refused


def test_folders_that_are_no_checkpoint(megatron: Path, refuse: Callable[..., None], tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no such folder")
    (megatron / "metadata.json").unlink()
    refuse(megatron, "metadata.json is missing", "not saved completely")
    (megatron / "metadata.json").write_text("{")
    refuse(megatron, "metadata.json", "JSON")
    (megatron / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    refuse(megatron, "'zarr'", "--ckpt-convert-format torch_dist")
    (megatron / "mp_rank_00").mkdir()
    refuse(megatron, "old format", "--ckpt-convert-format torch_dist")
    above = tmp_path / "above"
    above.mkdir()
    for said, fragment in (("../megatron", "neither an iteration"), ("12", "iter_0000012")):
        (above / "latest_checkpointed_iteration.txt").write_text(said)
        refuse(above, fragment)


def test_models_of_another_kind(models: dict[str, Path], refuse: Callable[..., None], tmp_path: Path) -> None:
    cases = {
        "decoder.layers.mlp.router.weight": "holds a mixture of experts",
        "decoder.layers.mlp.router.bias": "a router with biases",
        "decoder.layers.mlp.fc1_latent_proj.weight": "latent projections",
        "decoder.layers.self_attention.linear_kv_down_proj.weight": "latent attention",
        "mtp.layers.0.enorm.weight": "multi-token prediction",
        "decoder.layers.self_attention.linear_qkv.layer_norm_bias": "LayerNorm",
        "decoder.layers.self_attention.q_layernorm.weight": "unexpected decoder.layers.self_attention.q_layernorm",
    }
    for number, (key, fragment) in enumerate(cases.items()):
        state = by_hand(models["llama"], padded=128) | {key: torch.ones(2, 4)}
        refuse(save_megatron(tmp_path / str(number), state), key, fragment)
    state = by_hand(models["llama"], padded=128)
    del state["decoder.layers.mlp.linear_fc2.weight"]
    refuse(save_megatron(tmp_path / "missing", state), "missing decoder.layers.mlp.linear_fc2.weight")
    refuse(save_megatron(tmp_path / "none", {"x": torch.ones(2)}), "0 tensors *embedding.word_embeddings.weight")


def test_a_config_of_another_model(megatron: Path, models: dict[str, Path], refuse: Callable[..., None]) -> None:
    refuse(megatron, "missing decoder.layers.self_attention.linear_qkv.bias", config=models["qwen2"])
    config = json.loads((models["llama"] / "config.json").read_text())
    other = megatron.parent / "other.json"
    for change, fragment in (
        ({"intermediate_size": 40}, "mlp.linear_fc1.weight is [2, 96, 32], the model needs [2, 80, 32]"),
        ({"num_hidden_layers": 3}, "the model needs [3, "),
        ({"vocab_size": 129}, "embedding.word_embeddings.weight is [128, 32], the model needs [129, 32]"),
        ({"tie_word_embeddings": True}, "unexpected output_layer.weight"),
    ):
        other.write_text(json.dumps({**config, **change}))
        refuse(megatron, str(other), fragment, config=other)
    refuse(megatron, "No such file", config=megatron.parent / "nowhere")
    refuse(megatron, "--tokenizer", options=["--tokenizer", str(megatron)])
    refuse(megatron, "--verify", options=["--verify", "--format", "checkpoint"])


def test_rows_that_are_too_many_for_padding(
    models: dict[str, Path], refuse: Callable[..., None], tmp_path: Path
) -> None:
    state = by_hand(models["llama"], padded=97 + 8192)
    refuse(save_megatron(tmp_path / "megatron", state), "8289 rows, vocab_size is 97: too many to be padding")


def test_damaged_files(megatron: Path, refuse: Callable[..., None]) -> None:
    [tensors] = megatron.glob("*.distcp")
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    refuse(megatron, tensors.name)
    tensors.write_bytes(content.replace(b"data.pkl", b"date.pkl"))
    refuse(megatron, tensors.name, "damaged")
    tensors.unlink()
    refuse(megatron, tensors.name)
    tensors.write_bytes(content)
    metadata = megatron / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole[:-40])
    refuse(megatron, ".metadata", "damaged")
    name = tensors.name.encode()
    metadata.write_bytes(whole.replace(name, b"../" + name[3:]))
    refuse(megatron, "not inside it")


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["common.pt", "common_state", ".metadata", "attribute"])
def test_nothing_is_executed(
    megatron: Path, refuse: Callable[..., None], tmp_path: Path, models: dict[str, Path], place: str
) -> None:
    canary = tmp_path / "canary"
    if place == ".metadata":
        (megatron / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
        refuse(megatron, ".metadata", "mkdir")
    elif place == "attribute":
        # Where Megatron keeps its plans; nobody reads it, but it is unpickled.
        metadata = dcp.FileSystemReader(megatron).read_metadata()
        metadata.all_local_plans = [Canary(canary)]  # type: ignore[attr-defined]
        (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
        refuse(megatron, ".metadata", "mkdir")
    else:
        args = argparse.Namespace(num_layers=Canary(canary), hidden_size=32)
        if place == "common.pt":
            torch.save({"args": args, "more": Canary(canary)}, megatron / "common.pt")
        else:
            state = {"common_state/shard_0_1": [{"args": args}], **by_hand(models["llama"], padded=128)}
            megatron = save_megatron(tmp_path / "new", state)
        refuse(megatron, "its args have no num_layers", "--config", config=None)
        quiet_from(megatron, tmp_path / "hf", config=models["llama"])
        assert read_folder(tmp_path / "hf") == read_folder(models["llama"])
    assert not canary.exists()


def test_settings_that_cannot_be_used(
    megatron: Path, models: dict[str, Path], refuse: Callable[..., None], tmp_path: Path
) -> None:
    refuse(megatron, "its args cannot be read", "--config", config=None)
    (megatron / "common.pt").write_bytes(b"PK nothing")
    refuse(megatron, "its args cannot be read", "--config", config=None)
    quiet_to(tmp_path / "good", hf=str(models["llama"]))
    args = torch.load(tmp_path / "good" / "release" / "common.pt", weights_only=False)["args"]
    for change, fragment in (
        ({"num_experts": 8}, "missing decoder.layers.mlp.router.weight"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"window_size": (4095, 0)}, "window_size (4095, 0)"),
        ({"window_size": (-1, 0), "num_layers": 10**9}, "num_layers 1000000000"),
        ({"window_size": (7, 3)}, "window_size (7, 3)"),
        ({"window_size": (7, 0), "window_attn_skip_freq": [1]}, "window_attn_skip_freq [1]"),
        ({"window_size": (7, 0), "window_attn_skip_freq": 0}, "window_attn_skip_freq 0"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"norm_epsilon": 10**400}, "no norm_epsilon"),
        ({"rotary_seq_len_interpolation_factor": "x"}, "rotary_seq_len_interpolation_factor 'x', a positive number"),
        ({"rotary_seq_len_interpolation_factor": -2}, "rotary_seq_len_interpolation_factor -2, a positive number"),
        ({"use_rope_scaling": True, "rope_scaling_factor": None}, "rope_scaling_factor None, a positive number"),
        ({"ffn_hidden_size": 40}, "mlp.linear_fc1.weight is [2, 96, 32]"),
    ):
        torch.save({"args": argparse.Namespace(**{**vars(args), **change})}, megatron / "common.pt")
        refuse(megatron, fragment, config=None)


def test_another_model_under_a_given_config(
    megatron: Path, models: dict[str, Path], refuse: Callable[..., None], tmp_path: Path
) -> None:
    """What no tensor betrays must be refused by the settings alone, whatever else they say."""
    quiet_to(tmp_path / "good", hf=str(models["llama"]))
    args = torch.load(tmp_path / "good" / "release" / "common.pt", weights_only=False)["args"]
    scaled = {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}
    others: list[dict[str, Any]] = [
        {"rotary_interleaved": True, "norm_epsilon": 3e-5, "rotary_base": 99},
        {"rotary_percent": 0.5},
        {"position_embedding_type": "yarn"},
        {"no_rope_freq": [0, 1]},
        {"normalization": "LayerNorm"},
        {"apply_layernorm_1p": True},
        {"apply_residual_connection_post_layernorm": True},
        {"swiglu": False},
        {"swiglu": None},
        {"squared_relu": True},
        {"glu_linear_offset": 1.0},
        {"activation_func_clamp_value": 0.0},
        {"softmax_type": "learnable"},
        {"softmax_scale": 1.0},
        {"qk_l2_norm": True},
        {"mtp_num_layers": 1},
        {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 4},
        {"num_query_groups": 1},
        {"rotary_seq_len_interpolation_factor": 2, **scaled},
        {"window_size": (7, 3)},
    ]
    for change in others:
        torch.save({"args": argparse.Namespace(**{**vars(args), **change})}, megatron / "common.pt")
        [(name, value)] = list(change.items())[:1]
        refuse(megatron, f"{megatron / 'common.pt'}: its args have {name} {value!r}")
    # What other versions say for the same.
    same = {"no_rope_freq": [0, 0], "rotary_interleaved": None, "mtp_num_layers": 0, "window_size": None}
    same |= {"softmax_scale": args.kv_channels**-0.5, "rotary_percent": 1, "window_attn_skip_freq": 2}
    torch.save({"args": argparse.Namespace(**{**vars(args), **same})}, megatron / "common.pt")
    quiet_from(megatron, tmp_path / "hf", config=models["llama"])
    for name in vars(args).keys() & set(same):
        delattr(args, name)
    torch.save({"args": args}, megatron / "common.pt")
    quiet_from(megatron, tmp_path / "old", config=models["llama"])
    assert read_folder(tmp_path / "old") == read_folder(tmp_path / "hf") == read_folder(models["llama"])


def test_settings_that_cost_memory(models: dict[str, Path], tmp_path: Path) -> None:
    """A number under which a value is remembered makes Python's unpickler reserve that many places."""
    quiet_to(tmp_path / "good", hf=str(models["llama"]))
    release = tmp_path / "good" / "release"
    assert read_args(release, read_metadata(release)) is not None
    with zipfile.ZipFile(release / "common.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    for head, packing in ((b"}q\x00", zipfile.ZIP_DEFLATED), (b"}r" + (1_000_000).to_bytes(4, "little"), 0)):
        assert pickled[2:5] == b"}q\x00"
        with zipfile.ZipFile(release / "common.pt", "w", packing) as archive:
            archive.writestr(name, pickled[:2] + head + pickled[5:])
        assert read_args(release, read_metadata(release)) is None


def test_the_new_place_of_settings(models: dict[str, Path], tmp_path: Path) -> None:
    """Newer versions of Megatron keep them among the tensors, as an object."""
    quiet_to(tmp_path / "good", hf=str(models["qwen3"]))
    args = torch.load(tmp_path / "good" / "release" / "common.pt", weights_only=False)["args"]
    state = {"common_state/shard_0_1": [{"args": args}], **by_hand(models["qwen3"], padded=128)}
    quiet_from(save_megatron(tmp_path / "megatron", state), tmp_path / "hf")
    assert read_folder(tmp_path / "hf") == read_folder(models["qwen3"])


def test_models_that_megatron_has_not(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    def refused(name: str, change: dict[str, Any], *fragments: str, options: tuple[str, ...] = ()) -> None:
        folder = tmp_path / "hf"
        shutil.copytree(models[name], folder)
        edit_json(folder / "config.json", lambda config: config.update(change))
        assert_refused(run(to_megatron, "--hf", folder, "--output", tmp_path / "out", *options), *fragments)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
        shutil.rmtree(folder)

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    refused("llama", {"rope_parameters": scaling}, "rope_scaling", "8192")
    refused("llama", {}, "--tensor-parallel 0", options=("--tensor-parallel", "0"))
    refused("llama", {"intermediate_size": 40}, "do not fit config.json")
    assert_refused(run(to_megatron, "--output", tmp_path / "out"), "--hf", "--checkpoint")


def test_biases_that_megatron_has_not(run: Run, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SHAPE, attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    command = run(to_megatron, "--hf", tmp_path / "hf", "--output", tmp_path / "out")
    assert_refused(command, "biases are on attention only")


def test_a_text_model_inside_another(run: Run, tmp_path: Path) -> None:
    save_wrapped(tmp_path / "hf", "mistral3")
    command = run(to_megatron, "--hf", tmp_path / "hf", "--output", tmp_path / "out")
    assert_refused(command, "model_type mistral3 is a text model with other parts")


def test_one_dtype_for_what_megatron_keeps_as_one(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(models["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    save_file({**tensors, name: tensors[name].float()}, folder / "model.safetensors", metadata={"format": "pt"})
    command = run(to_megatron, "--hf", folder, "--output", tmp_path / "out")
    assert_refused(command, f"{name} is float32 and model.layers.0.input_layernorm.weight bfloat16", "--dtype")
    quiet_to(tmp_path / "out", hf=str(folder), dtype="bfloat16")


def test_nothing_that_exists_is_overwritten(run: Run, megatron: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for module, options in (
        (from_megatron, ["--megatron", megatron, "--config", models["llama"]]),
        (to_megatron, ["--hf", models["llama"]]),
    ):
        assert_refused(run(module, *options, "--output", tmp_path / "there"), "exists already")
    assert_refused(run(from_megatron, "--megatron", megatron, "--output", megatron / "hf"), "inside --megatron")


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of experts


def test_mixtures_that_megatron_has_not(run: Run, tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    config = AutoConfig.for_model("olmoe", **{**SHAPE, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmoe")
    one = save_mixture(tmp_path / "one", "qwen3_moe", num_experts_per_tok=1)
    plain = save_mixture(tmp_path / "plain", "dots1", norm_topk_prob=False)
    groups = {"norm_topk_prob": True, "n_routed_experts": 6, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 1}
    alone = save_mixture(tmp_path / "alone", "dots1", **groups)
    three = save_mixture(tmp_path / "three", "dots1", **{**groups, "topk_group": 2, "num_experts_per_tok": 3})
    for folder, fragments in (
        (tmp_path / "olmoe", ("model_type olmoe", "qwen2_moe, qwen3_moe, mixtral", "Megatron Bridge")),
        (one, ("num_experts_per_tok is 1", "Megatron has no such router")),
        (plain, ("norm_topk_prob is false", "Megatron divides sigmoid scores by their sum")),
        (alone, ("num_experts_per_tok is 1", "Megatron has no such router")),
        (three, ("num_experts_per_tok is 3 and topk_group 2", "half of num_experts_per_tok")),
    ):
        assert_refused(run(to_megatron, "--hf", folder, "--output", tmp_path / "output"), *fragments)
        assert not (tmp_path / "output").exists()


def test_experts_that_do_not_fit(models: dict[str, Path], refuse: Callable[..., None], tmp_path: Path) -> None:
    """Another number of experts than the config has, one that is missing, and a dense config."""
    state, key = by_hand(models["qwen2_moe"], padded=128), "decoder.layers.mlp.experts.experts"
    fewer = {name: tensor[:, :2] if name.startswith(key) else tensor for name, tensor in state.items()}
    shape = f"{key}.linear_fc1.weight is [2, 2, 40, 32], the model needs [2, 3, 40, 32]"
    refuse(save_megatron(tmp_path / "fewer", fewer), shape, config=models["qwen2_moe"])
    whole = save_megatron(tmp_path / "whole", state)
    refuse(whole, "holds a mixture of experts", "a model without experts", config=models["qwen2"])
    single = {}
    for name, tensor in layer_by_layer(state).items():
        base, _, end = name.partition(".experts.experts.")
        experts = {f"{base}.experts.experts.{i}.{end}": part.clone() for i, part in enumerate(tensor)} if end else {}
        for expert, part in experts.items():
            halves = dict(zip("wv", part.chunk(2), strict=True)) if end == "linear_fc1.weight" else {}
            single |= {f"{expert}_{w}": half.clone() for w, half in halves.items()} or {expert: part}
        single |= {} if end else {name: tensor}
    assert quiet_from(save_megatron(tmp_path / "single", single), tmp_path / "hf", config=models["qwen2_moe"])
    assert read_folder(tmp_path / "hf") == read_folder(models["qwen2_moe"])
    lost = "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight_v"
    del single[lost]
    refuse(save_megatron(tmp_path / "lost", single), f"missing {lost}", config=models["qwen2_moe"])


def test_settings_of_another_router_with_sigmoid_scores(refuse: Callable[..., None], tmp_path: Path) -> None:
    changes = {"norm_topk_prob": True, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    folders = {family: save_mixture(tmp_path / family, family, **changes) for family in ("dots1", "glm4_moe")}
    given: dict[str, list[tuple[dict[str, Any], str]]] = {
        "dots1": [
            ({"moe_router_topk_scaling_factor": "x"}, "moe_router_topk_scaling_factor 'x', supported: a positive"),
            ({"moe_router_topk_scaling_factor": 7.0}, "moe_router_topk_scaling_factor 7.0, --config has"),
            (
                {"moe_router_num_groups": 3, "moe_router_group_topk": 2},
                "moe_router_group_topk 2, supported with moe_router_topk 2: half of that",
            ),
            ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "moe_router_num_groups 2, --config has None"),
            ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias False, supported"),
            ({"rotary_percent": 0.5}, "rotary_percent 0.5, --config has 1.0"),
            ({"rotary_percent": 1.5}, "rotary_percent 1.5, supported: above 0"),
        ],
        "glm4_moe": [({"rotary_percent": 1.0}, "rotary_percent 1.0, --config has 0.5")],
    }
    derived: list[tuple[dict[str, Any], str]] = [
        ({"moe_shared_expert_intermediate_size": None}, "none of qwen2_moe"),
        ({"moe_shared_expert_intermediate_size": 7}, "none of qwen2_moe"),
        ({"moe_layer_freq": [1, 0]}, "moe_layer_freq [1, 0], which none of qwen2_moe"),
    ]
    for family, folder in folders.items():
        quiet_to(tmp_path / "to" / family, hf=str(folder))
        common = tmp_path / "to" / family / "release" / "common.pt"
        args = torch.load(common, weights_only=False)["args"]
        for change, fragment in given[family]:
            torch.save({"args": argparse.Namespace(**{**vars(args), **change})}, common)
            refuse(tmp_path / "to" / family, fragment, config=folder)
        for change, fragment in derived:
            torch.save({"args": argparse.Namespace(**{**vars(args), **change})}, common)
            refuse(tmp_path / "to" / family, fragment, config=None)


def test_settings_of_another_mixture(models: dict[str, Path], refuse: Callable[..., None], tmp_path: Path) -> None:
    quiet_to(tmp_path / "good", hf=str(models["qwen2_moe"]))
    release = tmp_path / "good" / "release"
    args = torch.load(release / "common.pt", weights_only=False)["args"]
    given = [
        ({"num_experts": 4}, "num_experts 4, --config has 3"),
        ({"num_experts": None}, "num_experts None, --config has 3"),
        ({"moe_router_topk": 1}, "moe_router_topk 1, --config has 2"),
        ({"moe_router_topk": "x"}, "moe_router_topk 'x', a number from 1"),
        ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax True, --config has False"),
        ({"moe_router_score_function": "tanh"}, "moe_router_score_function 'tanh', supported: softmax, sigmoid"),
        (
            {"moe_router_score_function": "sigmoid"},
            "moe_router_enable_expert_bias False, supported with sigmoid scores: True",
        ),
        (
            {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
            "moe_router_score_function 'sigmoid', --config has softmax",
        ),
        ({"moe_router_group_topk": 1}, "moe_router_group_topk 1, supported with softmax scores: None"),
        (
            {"moe_router_load_balancing_type": ["sinkhorn"]},
            "moe_router_load_balancing_type a list, supported: any but sinkhorn",
        ),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor 1.0, supported: None"),
        ({"moe_latent_size": 16}, "moe_latent_size 16"),
    ]
    derived = [
        ({"num_experts": 10**9}, "num_experts 1000000000, a number from 1 to 10,000"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq [1], a number or a list of 2"),
        ({"moe_layer_freq": 0}, "moe_layer_freq 0, a number or a list of 2"),
        ({"moe_shared_expert_gate": False}, "none of qwen2_moe, qwen3_moe, mixtral, dots1, glm4_moe has"),
        ({"moe_shared_expert_intermediate_size": "x"}, "moe_shared_expert_intermediate_size 'x'"),
        ({"add_bias_linear": True}, "add_bias_linear True"),
    ]
    cases = [(*case, models["qwen2_moe"]) for case in given] + [(*case, None) for case in derived]
    for change, fragment, config in cases:
        torch.save({"args": argparse.Namespace(**{**vars(args), **change})}, release / "common.pt")
        refuse(tmp_path / "good", fragment, config=config)
    # What other versions say for the same.
    same = {"moe_expert_capacity_factor": -1.0, "moe_router_topk_scaling_factor": 1.0, "moe_token_dropping": None}
    torch.save({"args": argparse.Namespace(**{**vars(args), **same})}, release / "common.pt")
    quiet_from(tmp_path / "good", tmp_path / "hf", config=models["qwen2_moe"])
    assert read_folder(tmp_path / "hf") == read_folder(models["qwen2_moe"])
