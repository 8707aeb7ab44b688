"""checkpoint.py merge: the average of float64, in the format of its sources, from sources of one model only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from converting import convert_back, convert_there, edit_tensors
from safetensors.torch import load_file
from tiny_models import SHAPE, assert_refused, edit_json, read_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.engine.weights.conversion import merge as merging
from retemper.engine.weights.parts import TensorParts
from retemper.tools import checkpoint as command

WEIGHTS = [1.0, 2.0, 5.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[torch.dtype, list[Path]]:
    """Three Hugging Face folders of one model in several files, in each dtype."""
    root, found = tmp_path_factory.mktemp("merged"), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found[dtype] = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)
            found[dtype].append(root / f"{dtype}-{seed}")
            model.save_pretrained(found[dtype][-1], max_shard_size="16KB")
    return found


@pytest.fixture(scope="module")
def checkpoints(folders, tmp_path_factory) -> list[Path]:
    """The fp32 ones as checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    for number, folder in enumerate(folders[torch.float32]):
        convert_there(folder, root / str(number))
    return [root / str(number) for number in range(3)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def exact(folders: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    """The averages in float64."""
    total = sum(weights)
    sources = [{name: tensor.double().numpy() for name, tensor in tensors_of(folder).items()} for folder in folders]
    return {name: sum(w / total * s[name] for w, s in zip(weights, sources, strict=True)) for name in sources[0]}


def assert_nearest(value: torch.Tensor, wanted: np.ndarray) -> None:
    """No representable neighbour of ``value`` is nearer to ``wanted`` (but for the error of float64)."""
    distance = np.abs(value.double().numpy() - wanted)
    for direction in (-torch.inf, torch.inf):
        neighbour = torch.nextafter(value, torch.full_like(value, direction))
        assert (distance <= np.abs(neighbour.double().numpy() - wanted) + 1e-15).all()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_checkpoints(run, folders, checkpoints, tmp_path, weights):
    chosen = [] if weights is None else ["--weights", *weights]
    done = run(command, "merge", *checkpoints, *chosen, "--output", tmp_path / "out")
    assert done.status == 0, done.stderr
    assert f"weight {1 / 3 if weights is None else 0.625:.4g}: {checkpoints[2]}" in done.stdout
    assert read_manifest(tmp_path / "out").kind == "converted" and find_damage(tmp_path / "out")[1] == []
    average = tiny_run.tensors_of(tmp_path / "out")
    wanted = exact(folders[torch.float32], weights or [1.0, 1.0, 1.0])
    assert average.keys() == wanted.keys()
    for name, tensor in average.items():
        assert tensor.dtype == torch.float32
        assert_nearest(tensor, wanted[name])
    convert_back(tmp_path / "out", tmp_path / "hf")  # what reads checkpoints reads this one
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.model.norm.weight, average["model.norm.weight"])
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert [one["folder"] for one in record["source"]["models"]] == [str(path) for path in checkpoints]
    assert all(len(one["manifest_xxh3_128"]) == 32 for one in record["source"]["models"])
    assert record["options"]["weights"] == pytest.approx([w / 8 for w in WEIGHTS] if weights else [1 / 3] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hugging_face_folders(folders, tmp_path, dtype):
    merging.merge(folders[dtype], tmp_path / "out", WEIGHTS, "16KB", say=lambda line: None)
    wanted, average = exact(folders[dtype], WEIGHTS), tensors_of(tmp_path / "out")
    assert average.keys() == wanted.keys() and len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    for name, tensor in average.items():
        assert tensor.dtype == dtype
        assert_nearest(tensor, wanted[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    hashes = json.loads((tmp_path / "out" / "conversion.json").read_text())["options"]["xxh3_128"]
    assert [set(one) for one in hashes] == [{path.name for path in f.glob("model*")} for f in folders[dtype]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_stay_as_they_are(folders, tmp_path, dtype):
    source = folders[dtype][0]
    merging.merge([source] * 3, tmp_path / "out", [0.3, 0.1, 0.7], "16KB", say=lambda line: None)
    assert read_folder(tmp_path / "out") == read_folder(source)


def test_sixteen_bits_are_rounded_once():
    half = torch.tensor([1.0], dtype=torch.bfloat16).double() + 2.0**-8  # between two neighbours in bf16
    values = torch.cat([half, half + 2.0**-40, half - 2.0**-40, -half - 2.0**-40, torch.tensor([3e38, 0.0, -5e-324])])
    rounded = merging.round_to_odd(values.double()).to(torch.bfloat16).double()
    assert rounded.tolist()[:4] == [1.0, 1.0 + 2**-7, 1.0, -1.0 - 2**-7]
    assert rounded[5] == 0 and values.to(torch.bfloat16)[1] == 1.0  # PyTorch's cast rounds twice


def test_memory_and_blocks_do_not_matter(folders, tmp_path, monkeypatch):
    merging.merge(folders[torch.bfloat16], tmp_path / "whole", say=lambda line: None)
    monkeypatch.setattr("retemper.engine.weights.block_copy.BLOCK_BYTES", 256)
    merging.merge(folders[torch.bfloat16], tmp_path / "blocks", workers=2, say=lambda line: None)
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "blocks")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_refusals(run, folders, checkpoints, saved_models, tmp_path):
    output = tmp_path / "out"
    first, *rest = folders[torch.float32]
    merge = lambda *arguments: run(command, "merge", *arguments, "--output", output)  # noqa: E731
    assert_refused(merge(first), "two or more")
    assert_refused(merge(first, *rest, "--weights", "1", "2"), "--weights has 2 numbers for 3 folders")
    assert_refused(merge(first, *rest, "--weights", "1", "0", "2"), "--weights has 0", "positive")
    assert_refused(merge(first, checkpoints[0]), "is a Hugging Face folder and", "hf_to_dcp.py")
    assert_refused(merge(first, folders[torch.bfloat16][0]), "is float32 in", "bfloat16 in", "--dtype")
    assert_refused(merge(first, saved_models["qwen2-tied"]), "are different models", "average those of one model")
    assert_refused(merge(checkpoints[0], tmp_path / "none"), "no such checkpoint folder")
    assert_refused(merge(*checkpoints, "--max-shard-size", "many"), "--max-shard-size")
    output.mkdir()
    assert_refused(merge(*checkpoints), "exists already")
    assert [*tmp_path.iterdir()] == [output]


def test_adapters_are_refused(run, checkpoints, tmp_path):
    adapter = Path(shutil.copytree(checkpoints[0], tmp_path / "adapter"))
    base = {"folder": "/models/base", "hash": "0" * 32}
    tiny_run.rewrite_manifest(adapter / "manifest.json", lambda content: content.update(base=base))
    done = run(command, "merge", checkpoints[0], adapter, "--output", tmp_path / "out")
    assert_refused(done, f"{adapter} holds an adapter", "dcp_to_hf.py")


def test_damage_is_found_and_nothing_is_left(run, checkpoints, folders, tmp_path):
    damaged = Path(shutil.copytree(checkpoints[1], tmp_path / "damaged"))
    file = max(damaged.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert_refused(run(command, "merge", checkpoints[0], damaged, "--output", tmp_path / "out"), str(file))
    wrong = Path(shutil.copytree(folders[torch.float32][1], tmp_path / "wrong"))
    edit_tensors(next(wrong.glob("*00001-of*")), lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    arguments = ("merge", folders[torch.float32][0], wrong, "--output", tmp_path / "out")
    assert_refused(run(command, *arguments), str(wrong), "NaN or infinite")
    assert {path.name for path in tmp_path.iterdir()} == {"damaged", "wrong"}


def test_an_interruption_leaves_nothing_under_the_name(checkpoints, tmp_path, monkeypatch):
    rows, calls = TensorParts.rows, []

    def interrupted(self, name):
        calls.append(name)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return rows(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(TensorParts, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merging.merge(checkpoints, tmp_path / "out", WEIGHTS, say=lambda line: None)
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    merging.merge(checkpoints, tmp_path / "out", WEIGHTS, say=said.append)
    merging.merge(checkpoints, tmp_path / "again", WEIGHTS, say=lambda line: None)
    assert any("continuing from" in line for line in said)
    one, other = tiny_run.tensors_of(tmp_path / "out"), tiny_run.tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}


def test_another_tokenizer_is_noted(saved_models, tmp_path):
    other = Path(shutil.copytree(saved_models["mistral"], tmp_path / "other"))
    (other / "tokenizer.json").write_text("{}")
    edit_json(other / "config.json", lambda config: config.update(transformers_version="4.0"))  # is not the model
    said: list[str] = []
    merging.merge([saved_models["mistral"], other], tmp_path / "out", say=said.append)
    assert any(line.startswith(f"note: {other} has another tokenizer") for line in said)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (saved_models["mistral"] / "tokenizer.json").read_bytes()
