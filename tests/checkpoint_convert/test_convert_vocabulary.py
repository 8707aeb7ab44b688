"""Embeddings with more rows, or fewer, than they are stored with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from converting import EMBEDDING, HEAD, SINGLE, Copy, Run, convert_back, convert_there, edit_tensors, logits
from safetensors.torch import load_file
from tiny_models import assert_refused, edit_json, read_folder
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp
from retemper.engine.weights.checkpoint.manifest import read_manifest


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def more_rows(folder: Path) -> None:
    """As after training with a padded vocabulary, and a config that still names the tokens."""

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name in (EMBEDDING, HEAD):
            tensors[name] = torch.cat([tensors[name], torch.full((31, 32), 0.5, dtype=tensors[name].dtype)])

    edit_tensors(folder / SINGLE, pad)


@pytest.mark.parametrize("family", ["qwen2-tied", "mistral", "llama"])
def test_rows_are_added_and_cut_again(copy_model: Copy, tmp_path: Path, family: str) -> None:
    folder, padded, back = copy_model(family), tmp_path / "padded", tmp_path / "back"
    (folder / "tokenizer.json").unlink()
    said = convert_there(folder, tmp_path / "checkpoint", pad_vocab_to_multiple_of=64, verify=True)
    resized = [EMBEDDING] if family == "qwen2-tied" else [EMBEDDING, HEAD]
    assert f"vocabulary: 97 rows become 128 ({', '.join(resized)})" in said
    read_manifest(tmp_path / "checkpoint")
    record = json.loads((tmp_path / "checkpoint" / "conversion.json").read_text())
    assert record["vocabulary"] == {
        "tensors": resized,
        "rows_before": 97,
        "rows": 128,
        "added_rows_are": "mean of the rows before",
    }
    convert_back(tmp_path / "checkpoint", padded, verify=True)
    assert config_of(padded) == {**config_of(folder), "vocab_size": 128}
    wide, narrow = logits(padded), logits(folder)
    assert wide.shape[-1] == 128 and torch.equal(wide[..., :97], narrow)
    # No added token is more likely than the average one, hence the bound on every log-probability.
    loss = torch.log_softmax(narrow.float(), -1) - torch.log_softmax(wide.float(), -1)[..., :97]
    assert loss.max() <= np.log(128 / 97) + 0.02
    weights = load_file(next(padded.glob("*.safetensors")))
    for name in resized:
        rows = weights[name].double().numpy()
        assert np.abs(rows[97:] - rows[:97].mean(0)).max() <= 2**-8 * np.abs(rows[97:]).max()

    convert_back(tmp_path / "checkpoint", back, vocab_size=97, max_shard_size="8KB")
    assert read_folder(back) == read_folder(folder)
    assert config_of(back) == config_of(folder)
    record = json.loads((back / "conversion.json").read_text())
    for name in resized:
        assert record["tensors"][name]["from"] == record["tensors"][name]["to"], "the rows that are kept"


def test_rows_that_the_config_does_not_know(copy_model: Copy, tmp_path: Path, run: Run) -> None:
    folder, unchanged = copy_model("qwen3"), copy_model("mistral")
    before = read_folder(folder)
    (folder / "tokenizer.json").unlink()
    more_rows(folder)
    refused = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "checkpoint")
    assert_refused(refused, EMBEDDING, "128 rows", "vocab_size 97", "--vocab-size 128", "--vocab-size 97")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral", "qwen3"]

    convert_there(folder, tmp_path / "kept", vocab_size=128, verify=True)
    convert_back(tmp_path / "kept", tmp_path / "all", verify=True)
    assert read_folder(tmp_path / "all") == read_folder(folder) and config_of(tmp_path / "all")["vocab_size"] == 128
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "all").config.vocab_size == 128

    convert_there(folder, tmp_path / "cut", vocab_size=97, verify=True)
    convert_back(tmp_path / "cut", tmp_path / "few")
    assert read_folder(tmp_path / "few") == before and config_of(tmp_path / "few")["vocab_size"] == 97

    # A number that is already right changes nothing, the config's bytes included.
    convert_there(unchanged, tmp_path / "same", vocab_size=97)
    assert (tmp_path / "same" / "hf" / "config.json").read_bytes() == (unchanged / "config.json").read_bytes()


def test_a_config_that_knows_more_tokens_than_there_are_rows(copy_model: Copy, tmp_path: Path, run: Run) -> None:
    folder = copy_model("qwen3")
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=128))
    refused = run(hf_to_dcp, "--hf", folder, "--output", tmp_path / "checkpoint")
    assert_refused(refused, "97 rows", "vocab_size 128", "--vocab-size 128", "--vocab-size 97")
    convert_there(folder, tmp_path / "checkpoint", vocab_size=128)
    convert_back(tmp_path / "checkpoint", tmp_path / "back")
    assert load_file(tmp_path / "back" / SINGLE)[HEAD].shape == (128, 32)


def test_tokens_keep_their_rows(copy_model: Copy, tmp_path: Path, run: Run) -> None:
    folder = copy_model("qwen3")
    Tokenizer(models.WordLevel({f"t{number}": number for number in range(90)}, "t0")).save(
        str(folder / "tokenizer.json")
    )
    convert_there(folder, tmp_path / "checkpoint")
    options: list[tuple[Callable[..., object], list[object]]] = [
        (hf_to_dcp, ["--hf", folder]),
        (dcp_to_hf, ["--checkpoint", tmp_path / "checkpoint"]),
    ]
    for number, (module, source) in enumerate(options):
        refused = run(module, *source, "--output", tmp_path / "out", "--vocab-size", 89)
        assert_refused(refused, "--vocab-size 89", "tokenizer.json", "up to 89", "90 or more")
        assert not (tmp_path / "out").exists()
        assert run(module, *source, "--output", tmp_path / f"fits{number}", "--vocab-size", 90).status == 0


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--vocab-size", "0"], "--vocab-size 0"),
        (["--pad-vocab-to-multiple-of", "-8"], "--pad-vocab-to-multiple-of -8"),
        (["--vocab-size", "128", "--pad-vocab-to-multiple-of", "8"], "not allowed with"),
        (["--vocab-size", "64"], "cannot be read, so rows cannot be cut safely"),
    ],
)
def test_refuses_vocabularies_that_make_no_sense(
    saved_models: dict[str, Path], tmp_path: Path, run: Run, options: list[str], fragment: str
) -> None:
    refused = run(hf_to_dcp, "--hf", saved_models["qwen3"], "--output", tmp_path / "out", *options)
    assert_refused(refused, fragment)
    assert list(tmp_path.iterdir()) == []
