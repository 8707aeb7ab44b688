"""Bad input: one line that names the file or key, the value and the remedy; exit status 1; nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import EMBEDDING, HEAD, INDEX, SINGLE, Copy, Run, Start, convert_there, edit_tensors, logits
from safetensors.torch import load_file
from tiny_models import assert_refused, edit_json

from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.assets import HfAssets, is_hf_folder
from retemper.engine.weights.hugging_face.initial import open_weights


def wrong_shape(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({HEAD: torch.zeros(96, 32)}))


def missing_tensor(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))


def unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)}))


def distinct_head(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))


def other_embedding(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({EMBEDDING: torch.zeros(96, 32)}))


def quantized(folder: Path) -> None:
    edit_tensors(folder / SINGLE, lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.int8)}))


def truncated(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 8)


def absurd_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes((2**60).to_bytes(8, "little") + bytes(90))


def pickle_only(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def stranger(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="t5"))


def index_outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "../model.safetensors"}}))


def index_missing_file(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))


def two_sets_of_weights(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "other.safetensors")
    names = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))


def extra_tensor_of(dtype: str) -> Callable[[Path], None]:
    """Add a tensor of a dtype that PyTorch has not, after the published layout."""

    def spoil(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
        header["extra"] = {"dtype": dtype, "shape": [4], "data_offsets": [len(values), len(values) + 3]}
        text = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + values + bytes(3))

    return spoil


def config_with(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def nested_config(levels: int) -> Callable[[Path], None]:
    """A config with lists in each other."""

    def spoil(folder: Path) -> None:
        whole = (folder / "config.json").read_text().rstrip().removesuffix("}")
        (folder / "config.json").write_text(f'{whole}, "x": {"[" * levels}{"]" * levels}}}')

    return spoil


def folder_for_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (wrong_shape, ["lm_head.weight is [96, 32], the model needs [97, 32]"]),
        (other_embedding, ["model.embed_tokens.weight is [96, 32], the model needs [97, 32]"]),
        (missing_tensor, ["missing model.layers.1.self_attn.q_norm.weight"]),
        (unexpected_tensor, ["unexpected model.extra.weight"]),
        (distinct_head, ["tie_word_embeddings", HEAD, EMBEDDING]),
        (quantized, [HEAD, "int8", "dequantized"]),
        (truncated, [SINGLE, "truncated"]),
        (pickle_only, ["pytorch_model.bin", "safetensors"]),
        (stranger, ["config.json: model_type", "t5"]),
        (index_outside, [INDEX, "../model.safetensors"]),
        (index_missing_file, ["model-00001-of-00002.safetensors: missing"]),
        (lambda folder: (folder / SINGLE).unlink(), ["neither", INDEX, SINGLE]),
        (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "weight_map"]),
        (two_sets_of_weights, [SINGLE, INDEX, "other.safetensors", "two sets of weights"]),
        (absurd_header, [SINGLE, "not a safetensors file"]),
        (folder_for_weights, [SINGLE, "cannot be read: Is a directory"]),
        (extra_tensor_of("F6_E2M3"), [SINGLE, "extra is F6_E2M3 [4]", "dequantized first"]),
        (extra_tensor_of("F99"), [SINGLE, "extra is F99 [4], which cannot be read"]),
        (config_with(hidden_size=2**40), ["config.json: hidden_size is 1099511627776; at most 16,777,216"]),
        (config_with(hidden_size=2**24, head_dim=2**24), ["config.json: hidden_size is 16777216; the sizes make"]),
        (config_with(num_hidden_layers=10**9), ["config.json: num_hidden_layers is 1000000000; at most 1,000"]),
        (config_with(rms_norm_eps=10**400), ["config.json: rms_norm_eps is 1000", "a number of at least 0"]),
        (nested_config(10**5), ["config.json: nested more than 50 levels deep"]),
        (nested_config(500), ["config.json: nested more than 50 levels deep"]),
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


def test_a_quantized_config_beside_plain_weights(copy_model: Copy, tmp_path: Path, run: Run) -> None:
    """transformers chooses by it how to read, and does not take the weights as they are; null is as if absent."""
    folder = copy_model("qwen3")
    plain = logits(folder)
    config_with(quantization_config={"bits": 4})(folder)
    with pytest.raises(ValueError, match="quant_method"):  # every method asks for a library of its own
        logits(folder)
    for quantization, value in (({"bits": 4}, "is {'bits': 4};"), ({"quant_method": "gptq"}, "is 'gptq';")):
        config_with(quantization_config=quantization)(folder)
        result = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "checkpoint")
        assert_refused(result, f"{folder}/config.json: quantization_config", value, "remove quantization_config")
        with pytest.raises(UserError, match=r"^model\.initialize_from: .*config\.json: quantization_config"):
            open_weights(folder)
    config_with(quantization_config=None)(folder)
    assert torch.equal(logits(folder), plain)
    convert_there(folder, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_this_user_may_not_read(
    copy_model: Copy, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = copy_model("qwen3")
    (folder / name).touch()
    open_file = os.open

    def guarded(path: Path, *options: Any, **more: Any) -> int:  # permissions would not stop root
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *options, **more)

    monkeypatch.setattr(os, "open", guarded)
    result = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "checkpoint")
    assert_refused(result, f"{folder / name}: cannot be read: Permission denied; make it readable")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]


def test_a_folder_that_this_user_may_not_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:  # permissions would not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    (tmp_path / "tokenizer.json").touch()
    for look in (is_hf_folder, HfAssets.read):
        with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be read: Permission denied; make it readable$"):
            look(tmp_path)


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
    largest = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def other_model(checkpoint: Path) -> None:
    edit_json(checkpoint / "hf" / "config.json", lambda config: config.update(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (lambda checkpoint: (checkpoint / "manifest.json").unlink(), ["not a complete checkpoint", "manifest.json"]),
        (lambda checkpoint: (checkpoint / "manifest.json").write_text("{"), ["manifest.json"]),
        (lambda checkpoint: (checkpoint / "tensors.json").unlink(), ["tensors.json"]),
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
    assert_refused(run(dcp_to_hf, *options, "--workers", "0"), "--workers 0")
    assert_refused(run(dcp_to_hf, *options, "--max-shard-size", "5"), "--max-shard-size 5", "5GB")
    assert_refused(run(hf_to_dcp, "--hf", tmp_path / "none", "--output", tmp_path / "x"), "--hf", "no such folder")
    assert run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "x", "--dtype", "int4").status == 1
    for option, number in (("--vocab-size", 2**62), ("--pad-vocab-to-multiple-of", 2**62)):
        result = run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "x", option, number)
        assert_refused(result, f"{option} {number}: ", "at most 16,777,216 are supported")
    with pytest.raises(UserError, match="--dtype int4"):
        convert_there(saved_models["llama"], tmp_path / "x", dtype="int4")
    assert list(tmp_path.iterdir()) == []


def test_the_output_stays_out_of_the_input(saved_models: dict[str, Path], tmp_path: Path, run: Run) -> None:
    hf, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    shutil.copytree(saved_models["qwen3"], hf)
    convert_there(hf, checkpoint)
    (tmp_path / "link").symlink_to(hf)
    before = sorted(tmp_path.rglob("*"))
    for output in (hf / "deep" / "out", hf / ".." / "hf" / "out", tmp_path / "link" / "out"):
        assert_refused(run(hf_to_dcp, "--hf", hf, "--output", output), f"--output {output}", "inside --hf")
    refused = run(dcp_to_hf, "--checkpoint", checkpoint, "--output", checkpoint / "out")
    assert_refused(refused, "inside --checkpoint", "elsewhere")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_nobody_can_write(saved_models: dict[str, Path], tmp_path: Path, run: Run) -> None:
    convert_there(saved_models["qwen3"], tmp_path / "checkpoint")
    for output in (Path("/proc/converted"), tmp_path / ("x" * 300)):  # permissions would not stop root
        for module, *source in (
            (hf_to_dcp, "--hf", saved_models["qwen3"]),
            (dcp_to_hf, "--checkpoint", tmp_path / "checkpoint"),
        ):
            assert_refused(run(module, *source, "--output", output), f"--output {output}: cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_takes_a_line(saved_models: dict[str, Path], tmp_path: Path, start: Start) -> None:
    # A limit on the size of files stands in for the disk; the larger tensors go beyond it. It holds for the process,
    # so that both commands run in one of their own.
    script = f"""
import resource, sys
from retemper.engine.weights.conversion import dcp_to_hf, hf_to_dcp
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
    program = start(script, folder=tmp_path)
    assert program.wait() == 0, program.err
    lines = program.err.splitlines()
    assert len(lines) == 2 and all("cannot be written: " in line and "File too large" in line for line in lines), lines
    # The largest files come first, so that none was finished, and nothing is worth keeping.
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
