"""What conversion.json says is so, by other readers; what the disk keeps is looked at; --verify finds a wrong model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_format
import pytest
import torch
import xxhash
from converting import EMBEDDING, HEAD, INDEX, SINGLE, Copy, Run, convert_back, convert_there, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TOKENIZER, assert_refused, edit_json, read_folder

import retemper
from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.errors import UserError
from retemper.engine.model.families import DecoderArchitecture
from retemper.engine.model.implementations import meta_model
from retemper.engine.model.language_model import LanguageModel
from retemper.engine.weights import block_copy
from retemper.engine.weights.checkpoint.assets import TOKENIZER_FILES
from retemper.engine.weights.checkpoint.manifest import read_manifest, write_manifest
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.engine.weights.conversion import logits
from retemper.engine.weights.conversion.provenance import CONVERSION_FILE
from retemper.engine.weights.parts import TensorParts


def proof(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONVERSION_FILE).read_text())


def hash_of(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# conversion.json


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_record_agrees_with_other_readers(saved_models: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    folder, checkpoint, back = saved_models["mistral"], tmp_path / "checkpoint", tmp_path / "back"
    convert_there(folder, checkpoint, dtype=dtype, workers=3)
    convert_back(checkpoint, back, max_shard_size="10KB", workers=3)
    originals = read_folder(folder)
    there, home = proof(checkpoint), proof(back)
    assert there["tensors"].keys() == home["tensors"].keys() == originals.keys()
    # The safetensors library reads the checkpoint's files.
    kept = torch.float32 if dtype == "auto" else torch.bfloat16
    loaded = {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}
    written = read_folder(back)
    weight_map = json.loads((back / INDEX).read_text())["weight_map"]
    for name, original in originals.items():
        assert there["tensors"][name]["shape"] == list(original.shape)
        assert there["tensors"][name]["from"] == {"dtype": "float32", "xxh3_128": hash_of(original.data)}
        in_checkpoint = {"dtype": str(kept).removeprefix("torch."), "xxh3_128": hash_of(raw(loaded[name]))}
        assert there["tensors"][name]["to"] == home["tensors"][name]["from"] == in_checkpoint
        assert home["tensors"][name]["to"]["xxh3_128"] == hash_of(written[name].data)
        assert home["tensors"][name]["file"] == weight_map[name]
        assert (checkpoint / there["tensors"][name]["file"]).is_file()
    assert there["left_out"] == home["left_out"] == {} and there["vocabulary"] is None and there["logits"] is None
    assert (there["tool"], home["tool"]) == ("hf_to_dcp", "dcp_to_hf")
    assert there["retemper_version"] == retemper.__version__ and there["versions"]["torch"] == torch.__version__
    assert there["source"]["folder"] == str(folder) and there["options"]["dtype"] == dtype
    assert home["source"]["manifest_xxh3_128"] == hash_of((checkpoint / "manifest.json").read_bytes())


def test_the_record_is_part_of_the_checkpoint(saved_models: dict[str, Path], tmp_path: Path) -> None:
    convert_there(saved_models["llama"], tmp_path / "checkpoint")
    assert CONVERSION_FILE in read_manifest(tmp_path / "checkpoint").files
    assert find_damage(tmp_path / "checkpoint")[1] == []
    edit_json(tmp_path / "checkpoint" / CONVERSION_FILE, lambda record: record.update(left_out={"x": ["y"]}))
    assert [damage.file for damage in find_damage(tmp_path / "checkpoint")[1]] == [CONVERSION_FILE]


def test_every_tensor_is_accounted_for(copy_model: Copy, tmp_path: Path) -> None:
    folder = copy_model("qwen2-tied")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    embedding = load_file(folder / weight_map[EMBEDDING])[EMBEDDING]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({HEAD: embedding.clone(), buffer: torch.ones(4)}, folder / "more.safetensors")
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update(dict.fromkeys((HEAD, buffer), "more.safetensors"))
    )
    convert_there(folder, tmp_path / "checkpoint")
    record = proof(tmp_path / "checkpoint")
    assert record["tensors"].keys() == weight_map.keys()
    assert sorted(record["left_out"].values()) == [[HEAD], [buffer]]
    assert any(EMBEDDING in reason for reason in record["left_out"])


def test_all_tokenizer_files_travel_as_they_are(copy_model: Copy, tmp_path: Path) -> None:
    folder = copy_model("llama")
    names = {name.replace("*", "qwen") for name in TOKENIZER_FILES} | {"generation_config.json", *TOKENIZER}
    for name in names - {"generation_config.json"}:
        (folder / name).write_bytes(f"content of {name}\r\n\xff".encode("latin-1"))
    (folder / "training_args.bin").write_bytes(b"\x80")
    convert_there(folder, tmp_path / "checkpoint")
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    assert "chat_template.jinja" in names and not (tmp_path / "back" / "training_args.bin").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Shards of any layout


class Shards(torch.Tensor):
    """A tensor that DCP saves in the parts that ``places`` name, as if ranks had held them."""

    places: list[tuple[slice, ...]]
    transposed: bool

    def __create_write_items__(self, name: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        items = []
        for place in self.places:
            offsets = torch.Size(part.start for part in place)
            sizes = torch.Size(part.stop - part.start for part in place)
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(self.dtype), self.size())
            items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        place = next(place for place in self.places if tuple(part.start for part in place) == tuple(index.offset))
        part = self.as_subclass(torch.Tensor)[place]
        return part.t().contiguous().t() if self.transposed else part.contiguous()


@pytest.mark.parametrize("transposed", [False, True], ids=["row by row", "column by column"])
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
def test_sharded_tensors_are_put_together(
    saved_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, transposed: bool
) -> None:
    convert_there(saved_models["mistral"], tmp_path / "checkpoint")
    originals = load_file(saved_models["mistral"] / SINGLE)
    cuts: dict[str, list[tuple[slice, ...]]] = {
        EMBEDDING: [(slice(0, 50), slice(0, 32)), (slice(50, 97), slice(0, 32))],  # by rows
        HEAD: [(slice(0, 97), slice(0, 16)), (slice(0, 97), slice(16, 32))],  # by columns
        "model.layers.0.mlp.down_proj.weight": [
            (slice(row, row + 16), slice(column, column + 24)) for row in (0, 16) for column in (0, 24)
        ],
    }
    tensors = {}
    for name, tensor in originals.items():
        if name in cuts:
            tensor = tensor.as_subclass(Shards)
            tensor.places, tensor.transposed = cuts[name], transposed
        tensors[name] = tensor
    for path in (*(tmp_path / "checkpoint").glob("*.safetensors"), tmp_path / "checkpoint" / "tensors.json"):
        path.unlink()
    old_format.write_tensors(tmp_path / "checkpoint", tensors)
    assert len([*(tmp_path / "checkpoint").glob("*.distcp")]) < len(originals), "several tensors to a file"
    manifest = read_manifest(tmp_path / "checkpoint")
    write_manifest(tmp_path / "checkpoint", dataclasses.replace(manifest, files={}, format_version=2))
    monkeypatch.setattr(block_copy, "BLOCK_BYTES", block_bytes)
    convert_back(tmp_path / "checkpoint", tmp_path / "back", workers=2)
    assert read_folder(tmp_path / "back") == read_folder(saved_models["mistral"])


# ---------------------------------------------------------------------------------------------------------------------
# What the disk gives back


def test_a_disk_that_keeps_something_else_is_found_out(
    saved_models: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_there(saved_models["llama"], tmp_path / "checkpoint")
    write = block_copy.write_exactly

    def flip(descriptor: int, offset: int, data: memoryview) -> None:
        write(descriptor, offset, data)
        if len(data) > 3000:
            os.pwrite(descriptor, bytes([data[100] ^ 1]), offset + 100)

    monkeypatch.setattr(block_copy, "write_exactly", flip)
    refused = run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "again")
    assert_refused(refused, "gives other values than were written", "weight")
    refused = run(dcp_to_hf, "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "back")
    assert_refused(refused, "gives other values than were written", "weight")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# ---------------------------------------------------------------------------------------------------------------------
# --verify


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_compared_with_transformers(saved_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    dtype = "bfloat16" if family == "mistral" else "auto"
    said = convert_there(saved_models[family], tmp_path / "checkpoint", dtype=dtype, verify=True)
    said += convert_back(tmp_path / "checkpoint", tmp_path / "back", dtype=dtype, verify=True)
    assert len([line for line in said if line.startswith("verified: logits differ")]) == 2
    for folder in (tmp_path / "checkpoint", tmp_path / "back"):
        measured = proof(folder)["logits"]
        assert 0 <= measured["max_abs_difference"] < 1e-4 * measured["largest_logit"]
        assert measured["argmax_agreement"] == 1 and measured["sequence_lengths"] == [7, 33, 64]


def with_theta(architecture: DecoderArchitecture) -> DecoderArchitecture:
    ropes = tuple(rope and dataclasses.replace(rope, theta=500.0) for rope in architecture.ropes)
    return dataclasses.replace(architecture, ropes=ropes)


def with_norm_eps(architecture: DecoderArchitecture) -> DecoderArchitecture:
    return dataclasses.replace(architecture, norm_eps=0.1)


@pytest.mark.parametrize("change", [with_theta, with_norm_eps])
def test_a_model_that_is_not_the_same_is_refused(
    saved_models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[DecoderArchitecture], DecoderArchitecture],
) -> None:
    convert_there(saved_models["qwen3"], tmp_path / "checkpoint")

    def other(architecture: DecoderArchitecture) -> LanguageModel:
        return meta_model(change(architecture))

    monkeypatch.setattr(logits, "meta_model", other)
    for module, *source in (
        (hf_to_dcp, "--hf", saved_models["qwen3"]),
        (dcp_to_hf, "--checkpoint", tmp_path / "checkpoint"),
    ):
        refused = run(module, *source, "--output", tmp_path / "out", "--verify")
        assert_refused(refused, "--verify: logits of transformers and of this program differ by")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_code_of_the_folder_is_never_run(copy_model: Copy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, canary = copy_model("llama"), tmp_path / "canary"
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    names = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=names))
    said = convert_there(folder, tmp_path / "checkpoint", verify=True)
    said += convert_back(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert [line for line in said if "auto_map" in line] == [
        "config.json refers to custom code (auto_map), which is not run; the weights are read as model_type llama"
    ]
    assert not canary.exists() and not (tmp_path / "back" / "modeling.py").exists()


def test_a_difference_in_one_tensor_is_seen(
    saved_models: dict[str, Path], copy_model: Copy, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is another model by two swapped rows."""
    other = copy_model("qwen3")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.1.self_attn.k_proj.weight"]
        weight[[0, 1]] = weight[[1, 0]]

    edit_tensors(other / SINGLE, swap)
    theirs: Callable[..., Any] = logits._theirs
    monkeypatch.setattr(logits, "_theirs", lambda folder, *rest: theirs(other, *rest))
    refused = run(hf_to_dcp, "--hf", saved_models["qwen3"], "--output", tmp_path / "out", "--verify")
    assert_refused(refused, "differ by")


@pytest.mark.parametrize(
    ("side", "value", "who"), [("_ours", "nan", "this program"), ("_theirs", "inf", "transformers")]
)
@pytest.mark.parametrize("place", [0, 2])
def test_logits_that_are_not_finite_prove_nothing(
    saved_models: dict[str, Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    value: str,
    who: str,
    place: int,
) -> None:
    """In one sequence only, whichever it is."""
    compute: Callable[..., list[torch.Tensor]] = getattr(logits, side)

    def spoiled(*arguments: Any) -> list[torch.Tensor]:
        found = [logits.clone() for logits in compute(*arguments)]
        found[place][3, 5] = float(value)
        return found

    monkeypatch.setattr(logits, side, spoiled)
    refused = run(hf_to_dcp, "--hf", saved_models["qwen3"], "--output", tmp_path / "out", "--verify")
    assert_refused(refused, f"logits of {who} are not finite for sequences of {[7, 33, 64][place]} tokens")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What a cast cannot hold, and a source that is another in the end


def test_values_that_a_dtype_cannot_hold_are_refused(copy_model: Copy, tmp_path: Path, run: Run) -> None:
    folder, name = copy_model("mistral"), "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder / SINGLE, lambda tensors: tensors[name][5].fill_(-7e4))
    refused = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "out", "--dtype", "float16")
    assert_refused(refused, f"{name}: values up to 7e+04 become infinite in float16, whose maximum is 6.55e+04")
    assert not (tmp_path / "out").exists()
    convert_there(folder, tmp_path / "out", dtype="bfloat16")
    # What was infinite before is nobody's loss.
    edit_tensors(folder / SINGLE, lambda tensors: tensors[name][5].fill_(float("inf")))
    convert_there(folder, tmp_path / "half", dtype="float16", allow_nonfinite=True)
    convert_back(tmp_path / "half", tmp_path / "back", allow_nonfinite=True)
    assert load_file(tmp_path / "back" / SINGLE)[name][5].isinf().all()


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_a_source_that_is_changed_meanwhile_is_refused(
    copy_model: Copy, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder, rows, calls = copy_model("qwen3"), TensorParts.rows, []

    def replaced(self: TensorParts, name: str) -> Any:
        calls.append(name)
        if len(calls) == 6 and change == "replaced":
            other = tmp_path / "other"
            other.write_bytes((folder / SINGLE).read_bytes())
            edit_tensors(other, lambda tensors: tensors[EMBEDDING].fill_(1.0))
            os.replace(other, folder / SINGLE)
        if len(calls) == len(self.tensors) and change == "gone":
            (folder / "config.json").unlink()
        return rows(self, name)

    monkeypatch.setattr(TensorParts, "rows", replaced)
    refused = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "out", "--workers", 1)
    assert_refused(refused, f"{folder}: was changed during the conversion; do not change it, and start again")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]


def test_a_checkpoint_that_is_replaced_meanwhile_is_refused(
    copy_model: Copy, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File by file, as a copy over it does: what was written would be a mixture of two models."""
    folder, rows, calls = copy_model("qwen3"), TensorParts.rows, []
    convert_there(folder, tmp_path / "checkpoint")

    def replaced(self: TensorParts, name: str) -> Any:
        calls.append(name)
        if len(calls) == 6:
            for path in (tmp_path / "checkpoint").glob("*.safetensors"):
                shutil.copy(path, tmp_path / "other")
                os.replace(tmp_path / "other", path)
        return rows(self, name)

    monkeypatch.setattr(TensorParts, "rows", replaced)
    refused = run(dcp_to_hf, "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "out", "--workers", 1)
    assert_refused(refused, f"{tmp_path / 'checkpoint'}: was changed during the conversion; do not change it, and")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"dtype": "auto"}, {"tie_word_embeddings": None}])
def test_what_transformers_does_not_load_is_one_line(copy_model: Copy, tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = copy_model("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(UserError, match=r"--verify: transformers cannot load [^\n]*$"):
        convert_there(folder, tmp_path / "checkpoint", verify=True)
