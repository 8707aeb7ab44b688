"""Megatron checkpoints in and out, without Megatron: the published layout, every bit there and back, settings, memory.
test_megatron_core.py compares with Megatron itself."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from megatron_by_hand import MODELS, OLD_KEYS, by_hand, layer_by_layer, quiet_from, quiet_to, save_megatron, save_models
from safetensors.torch import load_file
from tiny_models import TOKENIZER, Command, edit_json, read_folder
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from retemper.checkpoint_convert import from_megatron, to_megatron
from retemper.checkpoint_convert.megatron_layout import Vocabulary
from retemper.checkpoint_convert.megatron_reading import MegatronModel
from retemper.checkpoint_convert.megatron_writing import MegatronLayout, MegatronParts
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.weights import block_copy, raw_bytes
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.engine.weights.dcp_files import read_dcp_parts
from retemper.engine.weights.hugging_face.model import open_hf_model

Run = Callable[..., Command]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders; not to be changed."""
    return save_models(tmp_path_factory.mktemp("models"))


def read_back(source: Any) -> dict[str, Tensor]:
    """All tensors of a source, whole."""
    read = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in source.tensors.items()}
    for name, tensor in read.items():
        with source.rows(name) as rows:
            rows(0, tensor)
    return read


# ---------------------------------------------------------------------------------------------------------------------
# The layout


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("style", ["stacked", "per layer", "other keys", "prefixed"])
def test_reads_the_published_layout(models: dict[str, Path], tmp_path: Path, model: str, style: str) -> None:
    state = by_hand(models[model], padded=112)
    if style == "per layer":
        state = layer_by_layer(state)
    if style == "other keys":
        for key in [key for key in OLD_KEYS if f"decoder.layers.{key}" in state]:
            state[f"decoder.layers.{OLD_KEYS[key]}"] = state.pop(f"decoder.layers.{key}")
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
    # Through DCP's own loader, which puts the parts together.
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
    parts = MegatronParts(
        model.parameters,
        model.parameters.tensors,
        model.architecture,
        MegatronLayout(Vocabulary(10, 2), per_layer=False),
    )
    assert parts.tensors["output_layer.weight"].shape == (100, 32)
    rows = torch.full((5, 32), torch.nan, dtype=torch.bfloat16)
    with parts.rows("output_layer.weight") as read:
        read(94, rows)
    assert torch.equal(rows[:3], model.parameters.read("lm_head.weight")[94:]) and not rows[3:].any()


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
    assert (found.ropes[0].scaling is not None) == (model == "llama")


def test_numbers_that_no_shape_betrays(models: dict[str, Path], tmp_path: Path) -> None:
    quiet_to(tmp_path / "megatron", hf=str(models["llama"]))
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**config, "rms_norm_eps": 3e-5}))
    said = quiet_from(tmp_path / "megatron", tmp_path / "hf", config=tmp_path / "other.json")
    assert any("rms_norm_eps is 3e-05 in config.json" in line and "1e-06" in line for line in said)
    assert not any("rope_theta is" in line for line in said)
    # One value that cannot be used hides no other.
    common = torch.load(tmp_path / "megatron" / "release" / "common.pt", weights_only=False)
    others = {"rotary_base": 10**5000, "window_size": (7, 0), "use_rope_scaling": True, "rope_scaling_factor": None}
    vars(common["args"]).update(others, hidden_size=None)
    torch.save(common, tmp_path / "megatron" / "release" / "common.pt")
    said = quiet_from(tmp_path / "megatron", tmp_path / "again", config=tmp_path / "other.json")
    for fragment in ("rms_norm_eps is 3e-05", "rope_theta is 10000.0", "rope_scaling_factor None", "layer 0 is None"):
        assert sum(fragment in line for line in said) == 1, (fragment, said)


def test_dtypes(models: dict[str, Path], tmp_path: Path) -> None:
    said = quiet_to(tmp_path / "megatron", hf=str(models["qwen2"]), dtype="bfloat16")
    originals = load_file(models["qwen2"] / "model.safetensors")
    assert f"cast {len(originals)} tensors from float32 to bfloat16" in said
    stored = read_back(MegatronModel(tmp_path / "megatron").published)
    assert stored.keys() == originals.keys()
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in originals.items())
    quiet_from(tmp_path / "megatron", tmp_path / "hf", config=models["qwen2"], dtype="float16", verify=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("model", ["qwen2", "qwen2_moe"])
def test_memory_is_a_block_whatever_the_layers(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """No more than a block is ever read at a time, also of a stacked tensor and of the middle of a fused one."""
    monkeypatch.setattr(block_copy, "BLOCK_BYTES", 512)
    sizes: list[int] = []

    read_into = raw_bytes.read_into

    def read(descriptor: int, offset: int, rest: memoryview, path: Path) -> None:
        sizes.append(len(rest))
        read_into(descriptor, offset, rest, path)

    monkeypatch.setattr(raw_bytes, "read_into", read)
    save_megatron(tmp_path / "megatron", by_hand(models[model], padded=128))
    quiet_from(tmp_path / "megatron", tmp_path / "hf", config=models[model])
    assert sizes and max(sizes) <= 512
    sizes.clear()
    quiet_to(tmp_path / "out", hf=str(models[model]))
    assert sizes and max(sizes) <= 512


def test_commands(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    command = run(to_megatron, "--hf", models["qwen3"], "--output", tmp_path / "megatron", "--verify")
    assert command.status == 0, command
    assert "padded the vocabulary of 97 with 31 rows of zeros" in command.stdout
    command = run(from_megatron, "--megatron", tmp_path / "megatron", "--output", tmp_path / "hf", "--verify")
    assert command.status == 0, command
    assert "so the output has none" in command.stdout
    assert read_dcp_parts(tmp_path / "megatron" / "release").tensors
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
