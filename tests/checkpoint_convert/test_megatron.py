"""Megatron checkpoints in and out, without Megatron: the published layout written down once more by hand, every bit
there and back, and a line for all that is wrong. test_megatron_core.py compares with Megatron itself."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, TOKENIZER, Command, assert_refused, edit_json, read_folder
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig, AutoModelForCausalLM

from retemper.checkpoint_convert import from_megatron, to_megatron
from retemper.checkpoint_convert.megatron_layout import Vocabulary
from retemper.checkpoint_convert.megatron_reading import MegatronModel
from retemper.checkpoint_convert.megatron_writing import Layout, MegatronPieces
from retemper.engine.checkpoint import block_copy, raw_bytes, tensor_files
from retemper.engine.checkpoint.manifest import read_manifest
from retemper.engine.checkpoint.tensor_files import CheckpointRows
from retemper.engine.checkpoint.verify import find_damage
from retemper.engine.hugging_face.model import open_hf_model
from retemper.engine.model.architecture import parse_architecture

Run = Callable[..., Command]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "dtype": "bfloat16"},
    "llama, all biases": {"model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 6, "dtype": "float16"},
}
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
OLD_KEYS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of each of MODELS, random in every parameter; not to be changed."""
    root = tmp_path_factory.mktemp("models")
    for name, settings in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**{**SHAPE, **settings})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        model.to(getattr(torch, settings.get("dtype", "float32"))).save_pretrained(root / name)
        for file, content in TOKENIZER.items():
            (root / name / file).write_bytes(content)
    return {name: root / name for name in MODELS}


def read_back(source: Any) -> dict[str, Tensor]:
    """All tensors of a source, whole."""
    read = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in source.tensors.items()}
    for name, tensor in read.items():
        with source.rows(name) as rows:
            rows(0, tensor)
    return read


def by_hand(folder: Path, padded: int) -> dict[str, Tensor]:
    """The Megatron tensors of a Hugging Face folder, stacked: block j of group g of query, key and value begins at row
    (g (r + 2) + j) d, where r query blocks come first, then the key, then the value."""
    hf, config = load_file(folder / "model.safetensors"), AutoConfig.from_pretrained(folder)
    groups, count = config.num_key_value_heads, config.num_hidden_layers
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    r = config.num_attention_heads // groups
    state = {"decoder.final_layernorm.weight": hf["model.norm.weight"]}
    for key, name in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        if f"{name}.weight" in hf:
            table = torch.zeros(padded, config.hidden_size, dtype=hf[f"{name}.weight"].dtype)
            table[: config.vocab_size] = hf[f"{name}.weight"]
            state[f"{key}.weight"] = table

    def stack(key: str, make: Callable[[str], Tensor], needs: str) -> None:
        if f"model.layers.0.{needs}" in hf:
            state[f"decoder.layers.{key}"] = torch.stack([make(f"model.layers.{i}.") for i in range(count)])

    for kind in ("weight", "bias"):

        def qkv(layer: str, kind: str = kind) -> Tensor:
            q, k, v = (hf[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv")
            fused = torch.full(((r + 2) * groups * d, *q.shape[1:]), torch.nan, dtype=q.dtype)
            for group in range(groups):
                for j in range(r):
                    at, head = (group * (r + 2) + j) * d, (group * r + j) * d
                    fused[at : at + d] = q[head : head + d]
                for j, part in ((r, k), (r + 1, v)):
                    at = (group * (r + 2) + j) * d
                    fused[at : at + d] = part[group * d : group * d + d]
            return fused

        def fc1(layer: str, kind: str = kind) -> Tensor:
            gate, up = hf[f"{layer}mlp.gate_proj.{kind}"], hf[f"{layer}mlp.up_proj.{kind}"]
            fused = torch.cat([up, up])
            fused[: config.intermediate_size] = gate
            return fused

        stack(f"self_attention.linear_qkv.{kind}", qkv, f"self_attn.q_proj.{kind}")
        stack(f"mlp.linear_fc1.{kind}", fc1, f"mlp.gate_proj.{kind}")
        for key, name in (("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")):
            stack(f"{key}.{kind}", lambda layer, name=name, kind=kind: hf[f"{layer}{name}.{kind}"], f"{name}.{kind}")
    for key, name in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
        ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
        ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    ):
        stack(key, lambda layer, name=name: hf[f"{layer}{name}"], name)
    return state


def layer_by_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with keys for each layer."""
    apart = {}
    for key, tensor in state.items():
        head, layers, rest = key.partition("decoder.layers.")
        apart |= (
            {f"{head}{layers}{i}.{rest}": part.clone() for i, part in enumerate(tensor)} if layers else {key: tensor}
        )
    return apart


def save_megatron(folder: Path, state: dict[str, Any], args: Any = None) -> Path:
    """A checkpoint as an iteration of a training run."""
    folder.mkdir()
    # As Megatron does: an object is one item, whatever it consists of.
    dcp.save(state, checkpoint_id=folder, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    if args is not None:
        torch.save({"args": args, "iteration": 3}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    return folder


def quiet_from(megatron: Path, output: Path, **options: Any) -> list[str]:
    """Convert; returns what was said."""
    said: list[str] = []
    from_megatron.convert(megatron, output, say=said.append, **options)
    return said


def quiet_to(output: Path, **options: Any) -> list[str]:
    """Convert; returns what was said."""
    said: list[str] = []
    to_megatron.convert(output, say=said.append, **options)
    return said


# ---------------------------------------------------------------------------------------------------------------------
# The layout


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("style", ["stacked", "per layer", "other keys", "prefixed"])
def test_reads_the_published_layout(models: dict[str, Path], tmp_path: Path, model: str, style: str) -> None:
    state = by_hand(models[model], padded=112)
    if style == "per layer":
        state = layer_by_layer(state)
    if style == "other keys":
        for key, other in OLD_KEYS.items():
            state[f"decoder.layers.{other}"] = state.pop(f"decoder.layers.{key}")
    if style == "prefixed":
        state = {f"module.{key}": tensor for key, tensor in state.items()}
    # Of the optimizer, under names of several versions; shapes do not matter.
    states = {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight",
        "chained_0.optimizer.x",
        "module.optimizer.y",
    }
    state |= {name: torch.ones(3) for name in states}
    save_megatron(tmp_path / "megatron", state)
    said = quiet_from(tmp_path / "megatron", tmp_path / "hf", config=models[model])
    assert read_folder(tmp_path / "hf") == read_folder(models[model])
    assert "left out 3 tensors of the optimizer" in said and any(line.startswith("cut 15 rows") for line in said)
    assert {"config.json", *TOKENIZER} <= {path.name for path in (tmp_path / "hf").iterdir()}
    record = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert set(record["left_out"]["state of the optimizer"]) == states
    name = "model.layers.1.self_attn.k_proj.weight"
    raw = read_folder(models[model])[name].data
    assert record["tensors"][name]["from"]["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per layer"])
def test_writes_the_published_layout(models: dict[str, Path], tmp_path: Path, model: str, per_layer: bool) -> None:
    quiet_to(
        tmp_path / "out", hf=str(models[model]), per_layer=per_layer, tensor_parallel=2, make_vocab_size_divisible_by=10
    )
    expected = by_hand(models[model], padded=100)
    if per_layer:
        expected = layer_by_layer(expected)
    release = tmp_path / "out" / "release"
    metadata = dcp.FileSystemReader(release).read_metadata().state_dict_metadata
    tensors = {name for name, item in metadata.items() if isinstance(item, TensorStorageMetadata)}
    assert tensors == expected.keys()
    assert all("._extra_state/shard_" in name for name in metadata.keys() - tensors)
    # Through DCP's own loader, which puts the pieces together.
    loaded = {key: torch.full_like(tensor, torch.nan) for key, tensor in expected.items()}
    dcp.load(loaded, checkpoint_id=release, no_dist=True)
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor), key
    assert json.loads((release / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_exact(models: dict[str, Path], tmp_path: Path, model: str) -> None:
    """Hugging Face -> Megatron -> checkpoint -> Megatron -> Hugging Face."""
    quiet_to(tmp_path / "one", hf=str(models[model]))
    quiet_from(tmp_path / "one", tmp_path / "checkpoint", config=tmp_path / "one" / "hf", format="checkpoint")
    assert (read_manifest(tmp_path / "checkpoint").kind, find_damage(tmp_path / "checkpoint")[1]) == ("converted", [])
    quiet_to(tmp_path / "two", checkpoint=tmp_path / "checkpoint", per_layer=True)
    quiet_from(tmp_path / "two", tmp_path / "hf", config=models[model], max_shard_size="10KB", verify=True)
    assert read_folder(tmp_path / "hf") == read_folder(models[model])
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    for file in ("config.json", "generation_config.json", *TOKENIZER):
        assert (tmp_path / "hf" / file).read_bytes() == (models[model] / file).read_bytes()
    assert all(path.name[0] != "." for path in tmp_path.iterdir()), "no temporary folder stays"


@pytest.mark.parametrize(
    ("vocab_size", "options", "rows"),
    [(32000, {}, 32000), (151643, {}, 151680), (97, {"tensor_parallel": 8}, 1024), (97, {"divisible_by": 1}, 97)],
)
def test_padding_of_the_vocabulary(vocab_size: int, options: dict[str, int], rows: int) -> None:
    assert Vocabulary(**options).padded(vocab_size) == rows


def test_rows_of_padding_are_zeros(models: dict[str, Path]) -> None:
    model = open_hf_model(models["llama"])
    pieces = MegatronPieces(model, model.tensors, model.architecture, Layout(Vocabulary(10, 2), per_layer=False))
    assert pieces.tensors["output_layer.weight"].shape == (100, 32)
    rows = torch.full((5, 32), torch.nan, dtype=torch.bfloat16)
    with pieces.rows("output_layer.weight") as read:
        read(94, rows)
    assert torch.equal(rows[:3], model.read("lm_head.weight")[94:]) and not rows[3:].any()


@pytest.mark.parametrize("model", MODELS)
def test_settings_there_and_back(models: dict[str, Path], tmp_path: Path, model: str) -> None:
    """Without a config, what we store for Megatron gives the same model."""
    folder = tmp_path / "hf"
    shutil.copytree(models[model], folder)
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {**scaling, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    changes = {"mistral": {"sliding_window": None}, "llama": {"rope_parameters": scaling}}
    edit_json(folder / "config.json", lambda config: config.update(changes.get(model, {})))
    quiet_to(tmp_path / "out", hf=str(folder))
    found = MegatronModel(tmp_path / "out").architecture
    wanted = parse_architecture(json.loads((folder / "config.json").read_text()))
    assert {**vars(found), "model_type": ""} == {**vars(wanted), "model_type": ""}
    assert (found.rope_scaling is not None) == (model == "llama")


def test_numbers_that_no_shape_betrays(models: dict[str, Path], tmp_path: Path) -> None:
    quiet_to(tmp_path / "megatron", hf=str(models["llama"]))
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**config, "rms_norm_eps": 3e-5}))
    said = quiet_from(tmp_path / "megatron", tmp_path / "hf", config=tmp_path / "other.json")
    assert any("rms_norm_eps is 3e-05 in config.json" in line and "1e-06" in line for line in said)
    assert not any("rope_theta is" in line for line in said)


def test_dtypes(models: dict[str, Path], tmp_path: Path) -> None:
    said = quiet_to(tmp_path / "megatron", hf=str(models["qwen2"]), dtype="bfloat16")
    originals = load_file(models["qwen2"] / "model.safetensors")
    assert f"cast {len(originals)} tensors from float32 to bfloat16" in said
    stored = read_back(MegatronModel(tmp_path / "megatron"))
    assert stored.keys() == originals.keys()
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in originals.items())
    quiet_from(tmp_path / "megatron", tmp_path / "hf", config=models["qwen2"], dtype="float16", verify=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"


def test_memory_is_a_block_whatever_the_layers(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than a block is ever read at a time, also of a stacked tensor and of the middle of a fused one."""
    monkeypatch.setattr(block_copy, "BLOCK_BYTES", 512)
    sizes: list[int] = []

    def read(descriptor: int, offset: int, into: Tensor, path: Path) -> None:
        sizes.append(into.numel() * into.element_size())
        raw_bytes.read_exactly(descriptor, offset, into, path)

    monkeypatch.setattr(tensor_files, "read_exactly", read)
    monkeypatch.setattr("retemper.engine.hugging_face.folder.read_exactly", read)
    save_megatron(tmp_path / "megatron", by_hand(models["qwen2"], padded=128))
    quiet_from(tmp_path / "megatron", tmp_path / "hf", config=models["qwen2"])
    assert sizes and max(sizes) <= 512
    sizes.clear()
    quiet_to(tmp_path / "out", hf=str(models["qwen2"]))
    assert sizes and max(sizes) <= 512


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


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
    refuse(megatron, "metadata.json is missing", "not saved to its end")
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
        "decoder.layers.mlp.router.weight": "mixture of experts",
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
        ({"intermediate_size": 40}, "mlp.linear_fc1.weight is [2, 96, 32], the model wants [2, 80, 32]"),
        ({"num_hidden_layers": 3}, "the model wants [3, "),
        ({"vocab_size": 129}, "embedding.word_embeddings.weight is [128, 32], the model wants [129, 32]"),
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
    refuse(save_megatron(tmp_path / "megatron", state), "8289 rows, vocab_size is 97: too many for padding")


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
        refuse(megatron, "its args hold no num_layers", "--config", config=None)
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
        ({"num_experts": 8}, "num_experts 8"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"window_size": (4095, 0)}, "window_size (4095, 0)"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"ffn_hidden_size": 40}, "mlp.linear_fc1.weight is [2, 96, 32]"),
    ):
        torch.save({"args": argparse.Namespace(**{**vars(args), **change})}, megatron / "common.pt")
        refuse(megatron, fragment, config=None)


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


def test_commands(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    command = run(to_megatron, "--hf", models["qwen3"], "--output", tmp_path / "megatron", "--verify")
    assert command.status == 0, command
    assert "padded the vocabulary of 97 with 31 rows of zeros" in command.stdout
    command = run(from_megatron, "--megatron", tmp_path / "megatron", "--output", tmp_path / "hf", "--verify")
    assert command.status == 0, command
    assert "carries none" in command.stdout
    assert CheckpointRows(tmp_path / "megatron" / "release").tensors
    assert (
        load_file(tmp_path / "hf" / "model.safetensors").keys()
        == load_file(models["qwen3"] / "model.safetensors").keys()
    )


def test_the_guide() -> None:
    """Its commands have the options that they use."""
    text = (Path(__file__).parents[2] / "docs" / "megatron.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    python checkpoint_convert/(\w+)\.py (.*)$", text, re.MULTILINE)
    assert {name for name, _ in commands} == {"from_megatron", "to_megatron"}
    for name, options in commands:
        {"from_megatron": from_megatron, "to_megatron": to_megatron}[name].parse_arguments(shlex.split(options))
