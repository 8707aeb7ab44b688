"""Hugging Face -> checkpoint -> Hugging Face: every bit back, the same logits, and a line for all that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TOKENIZER, Command, assert_refused, edit_json, read_folder, read_safetensors
from transformers import AutoModelForCausalLM

import retemper
from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.checkpoint.assets import HfAssets
from retemper.engine.checkpoint.manifest import Manifest, read_manifest
from retemper.engine.checkpoint.store import CheckpointStore
from retemper.engine.checkpoint.tensors import (
    StoredTensor,
    load_tensors,
    model_tensors,
    optimizer_tensors,
    save_streamed_tensors,
    stored_tensors,
)
from retemper.engine.errors import UserError
from retemper.engine.hugging_face.model import HfModel
from retemper.engine.model.architecture import parse_architecture, read_hf_config
from retemper.engine.model.decoder import Decoder
from retemper.engine.parallel.process_group import Ranks

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Run = Callable[..., Command]
Copy = Callable[[str], Path]


def convert_there(hf: Path | str, output: Path, **options: str) -> list[str]:
    """Convert to a checkpoint; returns what was said."""
    said: list[str] = []
    hf_to_dcp.convert(str(hf), output, say=said.append, **options)
    return said


def convert_back(checkpoint: Path, output: Path, **options: str) -> list[str]:
    """Convert to a Hugging Face folder; returns what was said."""
    said: list[str] = []
    dcp_to_hf.convert(checkpoint, output, say=said.append, **options)
    return said


def logits(folder: Path) -> torch.Tensor:
    """What transformers computes from ``folder``, in the dtype that its config declares."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(40).view(2, 20) * 7 % 97
    with torch.no_grad():
        return model(tokens).logits


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply ``change`` to the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


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
    # An old save: the tied head written a second time, and a buffer. The stale file is of the old format's single kind.
    embedding = load_file(folder / json.loads((folder / INDEX).read_text())["weight_map"][EMBEDDING])[EMBEDDING]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({HEAD: embedding.clone(), buffer: torch.ones(4)}, folder / "more.safetensors")
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update(dict.fromkeys((HEAD, buffer), "more.safetensors"))
    )
    save_file({EMBEDDING: torch.zeros_like(embedding)}, folder / SINGLE)

    said = convert_there(folder, tmp_path / "checkpoint")
    assert any("ignored 1 safetensors file" in line and SINGLE in line for line in said)
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
# Memory and interruption


def test_tensors_pass_one_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((4, 4), float(name))
        alive.add(tensor.untyped_storage())
        most = max(most, len(alive))
        return tensor

    tensors = {str(number): StoredTensor((4, 4), torch.float32) for number in range(20)}
    save_streamed_tensors(tmp_path, tensors, read)
    assert most <= 2
    loaded = {name: torch.empty(4, 4) for name in tensors}
    load_tensors(tmp_path, loaded, distributed=False)
    assert all((tensor == float(name)).all() for name, tensor in loaded.items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_an_interrupted_conversion_leaves_nothing(
    saved_models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException] | BaseException,
) -> None:
    calls = []

    def read(self: HfModel, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) > 5:
            raise error
        return self.weights.read(name)

    monkeypatch.setattr(HfModel, "read", read)
    result = run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "checkpoint")
    assert result.status == (130 if error is KeyboardInterrupt else 1)
    assert "interrupted" in result.stderr or "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_takes_a_line(saved_models: dict[str, Path], tmp_path: Path) -> None:
    # A limit on the size of files stands in for the disk; the larger tensors go beyond it. It holds for the process,
    # so that both commands run in one of their own.
    script = f"""
import resource, sys
from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.errors import UserError
hf_to_dcp.convert({str(saved_models["llama"])!r}, "checkpoint")
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
for convert in (lambda: hf_to_dcp.convert({str(saved_models["llama"])!r}, "again"),
                lambda: dcp_to_hf.convert("checkpoint", "back")):
    try:
        convert()
    except UserError as error:
        print(error, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all("cannot be written: " in line and "File too large" in line for line in lines), lines
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def wrong_shape(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({HEAD: torch.zeros(96, 32)}))


def missing_tensor(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))


def unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)}))


def distinct_head(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))


def quantized(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.int8)}))


def truncated(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 8)


def pickle_only(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def stranger(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="gpt_neox"))


def index_outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "../model.safetensors"}}))


def index_missing_file(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (wrong_shape, ["lm_head.weight is [96, 32], the model wants [97, 32]"]),
        (missing_tensor, ["missing model.layers.1.self_attn.q_norm.weight"]),
        (unexpected_tensor, ["unexpected model.extra.weight"]),
        (distinct_head, ["tie_word_embeddings", HEAD, EMBEDDING]),
        (quantized, [HEAD, "int8", "dequantized"]),
        (truncated, [SINGLE, "truncated"]),
        (pickle_only, ["pytorch_model.bin", "safetensors"]),
        (stranger, ["config.json: model_type is 'gpt_neox'", "qwen3"]),
        (index_outside, [INDEX, "../model.safetensors"]),
        (index_missing_file, ["model-00001-of-00002.safetensors: missing"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    ],
)
def test_refuses_bad_folders(
    copy_model: Copy, tmp_path: Path, run: Run, spoil: Callable[[Path], None], fragments: list[str]
) -> None:
    folder = copy_model("qwen3")
    spoil(folder)
    result = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "checkpoint")
    assert_refused(result, *fragments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen3"], "neither output nor leftovers"


def test_nothing_is_overwritten(saved_models: dict[str, Path], tmp_path: Path, run: Run) -> None:
    convert_there(saved_models["llama"], tmp_path / "checkpoint")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "empty", "dangling", "checkpoint"):
        output = tmp_path / name
        assert_refused(run(hf_to_dcp, "--hf", saved_models["llama"], "--output", output), str(output), "exists already")
        back = run(dcp_to_hf, "--checkpoint", tmp_path / "checkpoint", "--output", output)
        assert_refused(back, str(output), "exists already")
    assert (tmp_path / "file").read_text() == "mine" and list((tmp_path / "empty").iterdir()) == []
    assert_refused(
        run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "file" / "below"), "cannot be written"
    )


def truncate_largest(checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def other_model(checkpoint: Path) -> None:
    edit_json(checkpoint / "hf" / "config.json", lambda config: config.update(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda checkpoint: (checkpoint / "manifest.json").unlink(), ["not a complete checkpoint", "manifest.json"]),
        (lambda checkpoint: (checkpoint / "manifest.json").write_text("{"), ["manifest.json"]),
        (lambda checkpoint: (checkpoint / ".metadata").unlink(), [".metadata"]),
        (lambda checkpoint: (checkpoint / "hf" / "config.json").unlink(), ["hf/config.json"]),
        (truncate_largest, [": damaged, it has"]),
        (other_model, ["another model", "unexpected model.layers.1"]),
    ],
)
def test_refuses_bad_checkpoints(
    saved_models: dict[str, Path], tmp_path: Path, run: Run, spoil: Callable[[Path], None], fragments: list[str]
) -> None:
    convert_there(saved_models["llama"], tmp_path / "checkpoint")
    spoil(tmp_path / "checkpoint")
    result = run(dcp_to_hf, "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "back")
    assert_refused(result, *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_refuses_bad_options(saved_models: dict[str, Path], tmp_path: Path, run: Run) -> None:
    options = ("--checkpoint", tmp_path / "none", "--output", tmp_path / "back")
    assert_refused(run(dcp_to_hf, *options), "no such checkpoint folder")
    assert_refused(run(dcp_to_hf, *options, "--max-shard-size", "5"), "--max-shard-size 5", "5GB")
    assert_refused(run(hf_to_dcp, "--hf", tmp_path / "none", "--output", tmp_path / "x"), "--hf", "no such folder")
    assert run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "x", "--dtype", "int4").status == 1
    with pytest.raises(UserError, match="--dtype int4"):
        convert_there(saved_models["llama"], tmp_path / "x", dtype="int4")
    assert list(tmp_path.iterdir()) == []


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

    repository = tmp_path / "cache" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "0123").symlink_to(saved_models["qwen3"])
    convert_there("somebody/tiny", tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(saved_models["qwen3"])


def test_the_commands_run_as_files(saved_models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(hf_to_dcp.__file__).parent
    for script, source, output in (
        ("hf_to_dcp.py", ["--hf", saved_models["llama"]], "checkpoint"),
        ("dcp_to_hf.py", ["--checkpoint", "checkpoint"], "back"),
    ):
        command = [sys.executable, folder / script, *source, "--output", output]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(f"wrote {output}: ")
        assert done.stderr == ""
    assert read_folder(tmp_path / "back") == read_folder(saved_models["llama"])
