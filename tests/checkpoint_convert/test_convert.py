"""Hugging Face -> checkpoint -> Hugging Face: every bit back, the same logits, and a line for all that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converting import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    Copy,
    Run,
    Start,
    convert_back,
    convert_there,
    edit_tensors,
    logits,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TOKENIZER, assert_refused, edit_json, read_folder, read_safetensors
from transformers import AutoModelForCausalLM

import retemper
from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.model.config_file import read_hf_config
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.checkpoint.manifest import Manifest, read_manifest
from retemper.engine.weights.checkpoint.store import CheckpointStore
from retemper.engine.weights.checkpoint.tensors import load_tensors, model_tensors, optimizer_tensors, stored_tensors

# ---------------------------------------------------------------------------------------------------------------------
# The round trip


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(saved_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    original, checkpoint, back = saved_models[family], tmp_path / "checkpoint", tmp_path / "deep" / "back"
    # One of each kind goes in sharded (see FAMILIES) and comes out sharded.
    size = "10KB" if family in ("llama", "mistral") else "5GB"
    assert not [line for line in convert_there(original, checkpoint) if line.startswith("cast")]
    assert not [line for line in convert_back(checkpoint, back, max_shard_size=size) if line.startswith("cast")]

    assert read_folder(back) == read_folder(original)
    assert (back / INDEX).exists() == (size == "10KB")
    for name in ("config.json", "generation_config.json", *TOKENIZER):
        assert (back / name).read_bytes() == (original / name).read_bytes()
    ours, theirs = logits(back), logits(original)
    assert ours.dtype == theirs.dtype == FAMILIES[family].dtype
    assert torch.equal(ours, theirs)


def test_the_checkpoint_is_what_the_trainer_starts_from(saved_models: dict[str, Path], tmp_path: Path) -> None:
    convert_there(saved_models["qwen3"], tmp_path / "checkpoint")
    manifest = read_manifest(tmp_path / "checkpoint")
    assert (manifest.kind, manifest.step, manifest.retemper_version) == ("converted", 0, retemper.__version__)
    model = Decoder(parse_architecture(read_hf_config(saved_models["qwen3"])))
    load_tensors(tmp_path / "checkpoint", model_tensors(model), distributed=False)
    originals = load_file(saved_models["qwen3"] / SINGLE)
    assert dict(model_tensors(model)).keys() == originals.keys()
    assert all(torch.equal(tensor, originals[name].float()) for name, tensor in model_tensors(model).items())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "no temporary folder stays"


def test_sharded_output(saved_models: dict[str, Path], tmp_path: Path) -> None:
    convert_there(saved_models["llama"], tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back", max_shard_size="10KB")
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    total = 0
    for path in files:
        tensors, metadata = read_safetensors(path)
        assert metadata == {"format": "pt"}
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
        size = sum(len(tensor.data) for tensor in tensors.values())
        assert size <= 10_000
        total += size
    assert index["metadata"] == {"total_size": total}


def test_tied_embeddings_are_stored_once(saved_models: dict[str, Path], tmp_path: Path) -> None:
    convert_there(saved_models["qwen2-tied"], tmp_path / "checkpoint")
    assert HEAD not in stored_tensors(tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert HEAD not in read_folder(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_redundant_tensors_are_left_out_and_said(copy_model: Copy, tmp_path: Path) -> None:
    folder = copy_model("qwen2-tied")
    before = read_folder(folder)
    # An old save: the tied head written a second time, and a buffer. The stale file is a shard of another save.
    embedding = load_file(folder / json.loads((folder / INDEX).read_text())["weight_map"][EMBEDDING])[EMBEDDING]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({HEAD: embedding.clone(), buffer: torch.ones(4)}, folder / "more.safetensors")
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update(dict.fromkeys((HEAD, buffer), "more.safetensors"))
    )
    stale = "model-00001-of-00009.safetensors"
    save_file({EMBEDDING: torch.zeros_like(embedding)}, folder / stale)

    said = convert_there(folder, tmp_path / "checkpoint")
    assert any("ignored 1 weight files" in line and stale in line for line in said)
    assert any("left out 1 tensors" in line and "inv_freq" in line for line in said)
    assert any(line.startswith(f"left out {HEAD}") for line in said)
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert read_folder(tmp_path / "back") == before


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize(
    ("convert_with_dtype", "convert_without"), [("there", "back"), ("back", "there")], ids=["to dcp", "to hf"]
)
def test_casts_as_asked(
    saved_models: dict[str, Path], tmp_path: Path, convert_with_dtype: str, convert_without: str
) -> None:
    options = {convert_with_dtype: {"dtype": "bfloat16"}, convert_without: {}}
    said = convert_there(saved_models["mistral"], tmp_path / "checkpoint", **options["there"])
    said += convert_back(tmp_path / "checkpoint", tmp_path / "back", **options["back"])
    originals, written = load_file(saved_models["mistral"] / SINGLE), load_file(tmp_path / "back" / SINGLE)
    assert [line for line in said if line.startswith("cast")] == [
        f"cast {len(originals)} tensors from float32 to bfloat16"
    ]
    assert originals.keys() == written.keys()
    for name, original in originals.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], original.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


@pytest.mark.parametrize("declared", ["float16", "float32"])
def test_each_tensor_keeps_its_own_dtype(copy_model: Copy, tmp_path: Path, declared: str) -> None:
    folder = copy_model("qwen3")
    edit_json(folder / "config.json", lambda config: config.update(dtype=declared))
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({HEAD: tensors[HEAD].float()}))
    convert_there(folder, tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(folder)
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.fixture
def trained(saved_models: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, Decoder]]:
    """Makes a checkpoint as the trainer writes it, fp32 weights with optimizer states, and gives its model."""

    def save(declared: dict[str, str]) -> tuple[Path, Decoder]:
        assets = HfAssets.read(saved_models["qwen2-tied"])
        config = {**(assets.config or {}), "dtype": None, **declared}
        model = Decoder(parse_architecture(config))
        model.initialize_(seed=1)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        store = CheckpointStore(tmp_path, Ranks(0, 1, torch.device("cpu")), keep_last=1, keep_best=False)
        manifest = Manifest(kind="training", step=7, consumed_tokens=70)
        return store.save(tensors, assets.with_config(config), manifest), model

    return save


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_a_training_checkpoint_is_written_as_declared(
    trained: Callable[..., tuple[Path, Decoder]], tmp_path: Path, declared: dict[str, str], expected: torch.dtype
) -> None:
    checkpoint, model = trained(declared)
    said = convert_back(checkpoint, tmp_path / "back")
    written, weights = load_file(tmp_path / "back" / SINGLE), dict(model.named_parameters())
    name = str(expected).removeprefix("torch.")
    casts = [] if expected == torch.float32 else [f"cast {len(weights)} tensors from float32 to {name}"]
    assert [line for line in said if line.startswith("cast")] == casts
    assert written.keys() == weights.keys(), "weights only: no optimizer states, no head"
    assert all(torch.equal(written[key], weights[key].to(expected)) for key in weights)
    record = json.loads((tmp_path / "back" / "conversion.json").read_text())
    states = {f"optimizer.{state}.{key}" for state in ("exp_avg", "exp_avg_sq", "step") for key in weights}
    assert set(record["left_out"].pop("state of the optimizer")) == states and not record["left_out"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {name}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == expected


def test_dtype_overrides_what_is_declared(trained: Callable[..., tuple[Path, Decoder]], tmp_path: Path) -> None:
    checkpoint, model = trained({"dtype": "bfloat16"})
    convert_back(checkpoint, tmp_path / "back", dtype="float32")
    written = load_file(tmp_path / "back" / SINGLE)
    assert all(torch.equal(written[name], parameter) for name, parameter in model.named_parameters())


def test_refuses_a_declared_dtype_that_weights_cannot_have(
    trained: Callable[..., tuple[Path, Decoder]], tmp_path: Path, run: Run
) -> None:
    checkpoint, _ = trained({"dtype": "int8"})
    result = run(dcp_to_hf, "--checkpoint", checkpoint, "--output", tmp_path / "back")
    assert_refused(result, "config.json", "'int8'", "--dtype")
    assert not (tmp_path / "back").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The Hub, and the commands as files


def test_a_hub_name_is_found_in_the_cache(
    saved_models: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run(hf_to_dcp, "--hf", "somebody/tiny", "--output", tmp_path / "checkpoint")
    assert_refused(result, "--hf somebody/tiny", "cannot be reached")
    assert not (tmp_path / "checkpoint").exists()

    repository, commit = tmp_path / "cache" / "models--somebody--tiny", "0123" * 10
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(saved_models["qwen3"])
    convert_there("somebody/tiny", tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(saved_models["qwen3"])


def test_the_commands_run_as_files(saved_models: dict[str, Path], tmp_path: Path, start: Start) -> None:
    folder = Path(hf_to_dcp.__file__).parent
    run_file = "import runpy, sys\nsys.argv[:1] = []\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    for script, source, output in (
        ("hf_to_dcp.py", ["--hf", saved_models["llama"]], "checkpoint"),
        ("dcp_to_hf.py", ["--checkpoint", "checkpoint"], "back"),
    ):
        program = start(run_file, folder / script, *source, "--output", output, folder=tmp_path)
        assert (program.wait(), program.err) == (0, "")
        assert program.out.splitlines()[-1].startswith(f"wrote {output}: ")
    assert read_folder(tmp_path / "back") == read_folder(saved_models["llama"])
