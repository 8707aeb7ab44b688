"""Conversions of mixtures of experts against transformers: expanded blocks, averages, more rows of the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from converting import convert_back, convert_there
from mixture_folders import TOKENS, VOCAB, logits, save_mixture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retemper.engine.weights.conversion.expand_blocks import expand_blocks
from retemper.engine.weights.conversion.merge import merge


def silent(line: str) -> None:
    pass


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 1]}),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
        ("mixtral", {}),
    ],
)
def test_expanded_blocks_compute_the_same_logits(family, changes, tmp_path):
    """Also where some blocks have no experts: their copies have none either."""
    source = save_mixture(tmp_path / "source", family, **changes)
    expand_blocks(str(source), tmp_path / "out", 2, max_shard_size="100KB", say=silent)
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    before, after = tensors(source), tensors(tmp_path / "out")
    options = json.loads((tmp_path / "out" / "conversion.json").read_text())["options"]
    for number, block in zip(options["new_blocks"], options["copies_of"], strict=True):
        of_new = {key: t for key, t in after.items() if f"layers.{number}." in key}
        assert of_new.keys() == {
            key.replace(f"layers.{block}.", f"layers.{number}.") for key in before if f"layers.{block}." in key
        }
        zero = {key for key, tensor in of_new.items() if not tensor.any()}
        assert zero == {key for key in of_new if key.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight"))}


@pytest.mark.parametrize("kind", ["folders", "checkpoints"])
def test_averages_are_those_of_each_tensor(kind, tmp_path):
    sources = [save_mixture(tmp_path / str(seed), "qwen2_moe", torch.bfloat16, seed) for seed in range(2)]
    wanted = [tensors(source) for source in sources]
    inputs = sources
    if kind == "checkpoints":
        inputs = [tmp_path / f"checkpoint-{number}" for number in range(2)]
        for source, target in zip(sources, inputs, strict=True):
            convert_there(source, target)
    merge(inputs, tmp_path / "out", [1.0, 3.0], say=silent)
    folder = tmp_path / "out"
    if kind == "checkpoints":
        convert_back(folder, folder := tmp_path / "hf")
    found = tensors(folder)
    assert found.keys() == wanted[0].keys()
    for name, tensor in found.items():
        exact = 0.25 * wanted[0][name].double() + 0.75 * wanted[1][name].double()
        assert torch.equal(tensor, exact.to(tensor.dtype)), name


def test_rows_are_added_to_the_vocabulary_and_the_experts_stay(tmp_path):
    source = save_mixture(tmp_path / "source", "qwen2_moe")
    convert_there(source, tmp_path / "checkpoint", vocab_size=VOCAB + 7)
    convert_back(tmp_path / "checkpoint", tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in tables)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=TOKENS).logits[0]
    torch.testing.assert_close(found[:, :VOCAB], logits(source), rtol=0, atol=1e-6)
