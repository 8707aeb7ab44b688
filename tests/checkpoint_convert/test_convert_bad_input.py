"""Bad input: one line that names the file or key, the value and the remedy; exit status 1; nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converting import EMBEDDING, HEAD, INDEX, SINGLE, Copy, Run, convert_there, edit_tensors
from tiny_models import assert_refused, edit_json

from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.errors import UserError


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
    edit_json(folder / "config.json", lambda config: config.update(model_type="gpt_neox"))


def index_outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "../model.safetensors"}}))


def index_missing_file(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (wrong_shape, ["lm_head.weight is [96, 32], the model wants [97, 32]"]),
        (other_embedding, ["model.embed_tokens.weight is [96, 32], the model wants [97, 32]"]),
        (missing_tensor, ["missing model.layers.1.self_attn.q_norm.weight"]),
        (unexpected_tensor, ["unexpected model.extra.weight"]),
        (distinct_head, ["tie_word_embeddings", HEAD, EMBEDDING]),
        (quantized, [HEAD, "int8", "dequantized"]),
        (truncated, [SINGLE, "truncated"]),
        (pickle_only, ["pytorch_model.bin", "safetensors"]),
        (stranger, ["config.json: model_type is 'gpt_neox'", "qwen3"]),
        (index_outside, [INDEX, "../model.safetensors"]),
        (index_missing_file, ["model-00001-of-00002.safetensors: missing"]),
        (lambda folder: (folder / SINGLE).unlink(), ["neither", INDEX, SINGLE]),
        (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "weight_map"]),
        (absurd_header, [SINGLE, "not a safetensors file"]),
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
    assert_refused(run(dcp_to_hf, *options, "--workers", "0"), "--workers 0")
    assert_refused(run(dcp_to_hf, *options, "--max-shard-size", "5"), "--max-shard-size 5", "5GB")
    assert_refused(run(hf_to_dcp, "--hf", tmp_path / "none", "--output", tmp_path / "x"), "--hf", "no such folder")
    assert run(hf_to_dcp, "--hf", saved_models["llama"], "--output", tmp_path / "x", "--dtype", "int4").status == 1
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
    # The largest files come first, so that none was finished, and nothing is worth keeping.
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
