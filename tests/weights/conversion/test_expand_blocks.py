"""Expanded models against transformers: the same logits, new blocks that learn alone, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_models import hf_config, hf_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retemper.engine.batch import Batch
from retemper.engine.config.settings import TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.model.decoder import Decoder
from retemper.engine.model.families import parse_decoder_architecture
from retemper.engine.parallel import trainable
from retemper.engine.weights.conversion.expand_blocks import expand_blocks, origins
from retemper.tools import expand_blocks as command

TOKENS = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(1))


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    config = hf_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    hf_model(config).to(dtype).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=TOKENS).logits[0]


def test_a_copy_follows_every_group():
    assert [block for block, _ in origins(6, 2)] == [0, 1, 2, 2, 3, 4, 5, 5]
    assert [number for number, (_, copied) in enumerate(origins(6, 2)) if copied] == [3, 7]
    assert [copied for _, copied in origins(32, 8)].count(True) == 8 and len(origins(32, 8)) == 40
    assert all(copied for _, copied in origins(3, 3)[1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "num_new"),
    [
        ("llama", 1),
        ("llama with biases", 3),
        ("llama multi-head", 3),
        ("granite", 1),
        ("stablelm in parallel", 3),
        ("phi3", 3),
    ],
)
def test_logits_of_transformers_are_unchanged(name, num_new, dtype, tmp_path):
    source = saved(name, tmp_path / "source", dtype)
    expand_blocks(str(source), tmp_path / "out", num_new, max_shard_size="100KB", say=lambda line: None)
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    before, after = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (source, tmp_path / "out")
    )
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    new, copied = (record["options"][key] for key in ("new_blocks", "copies_of"))
    assert len(new) == num_new and record["tensors"].keys() == after.keys()
    for number, block in zip(new, copied, strict=True):
        of_new = {key: t for key, t in after.items() if f"layers.{number}." in key}
        assert sum(not t.any() for t in of_new.values()) >= 2
        for key, tensor in of_new.items():
            old = before[key.replace(f"layers.{number}.", f"layers.{block}.")]
            assert tensor.dtype == old.dtype == dtype and (not tensor.any() or torch.equal(tensor, old))
    assert sum(map(torch.numel, after.values())) > sum(map(torch.numel, before.values()))


def test_new_blocks_learn_alone(tmp_path):
    """The printed patterns; the first gradients reach the zero projections, and nothing else of the old model."""
    source, said = saved("llama", tmp_path / "source"), []
    expand_blocks(str(source), tmp_path / "out", 3, say=said.append)
    (line,) = (line for line in said if "training.trainable" in line)
    patterns = json.loads(line[line.index("[") : line.rindex("]") + 1])
    architecture = parse_decoder_architecture(json.loads((tmp_path / "out" / "config.json").read_text()))
    model = Decoder(architecture)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    trainable.apply(model, TrainingConfig(1, trainable=patterns))
    batch = Batch.of_documents(TOKENS[0], [24], TOKENS[0].roll(-1))
    model(batch).backward()
    for name, parameter in model.named_parameters():
        is_new = any(f"layers.{number}." in name for number in (1, 3, 5))
        assert parameter.requires_grad == is_new
        assert (parameter.grad is not None) == is_new
        if is_new and ("o_proj" in name or "down_proj" in name):
            assert parameter.grad.abs().max() > 0


def test_kinds_of_layers_follow_their_blocks(tmp_path):
    """Every other layer attends to a window: lists by layer in the config are expanded."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    source = saved("qwen2 with windows", tmp_path / "source")
    assert json.loads((source / "config.json").read_text())["layer_types"] == kinds
    expand_blocks(str(source), tmp_path / "out", 3, say=lambda line: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6 and config["layer_types"] == [kind for kind in kinds for _ in range(2)]
    assert torch.equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize(
    ("name", "num_new", "words"),
    [
        ("llama", 2, "--num-blocks 2 does not divide the model's 3 blocks into groups of equal size; use one of 1, 3"),
        ("llama", 0, "--num-blocks 0 does not divide"),
        ("olmo2", 1, "normalize what they add"),
        ("gemma2", 1, "normalize what they add"),
    ],
)
def test_refused_in_one_line(name, num_new, words, tmp_path):
    source = saved(name, tmp_path / "source")
    with pytest.raises(UserError) as caught:
        expand_blocks(str(source), tmp_path / "out", num_new)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_windows_by_a_number_of_layers_are_refused(tmp_path):
    """Without a list by layer, the first ``max_window_layers`` layers would be others."""
    source = saved("qwen2 with windows", tmp_path / "source")
    path = source / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="sliding_windows of qwen2 depends on the number of blocks"):
        expand_blocks(str(source), tmp_path / "out", 3)


def test_models_of_transformers_are_refused(tmp_path):
    from generic_models import tiny_config

    config = tiny_config("gpt2")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="gpt2 is not one of the native families"):
        expand_blocks(str(tmp_path / "source"), tmp_path / "out", 1)


def test_command_line(tmp_path, capsys):
    source = saved("llama", tmp_path / "source")
    command.main(["--model", str(source), "--num-blocks", "1", "--output", str(tmp_path / "out")])
    assert f"wrote {tmp_path / 'out'}: " in capsys.readouterr().out
    with pytest.raises(UserError, match="exists"):
        command.main(["--model", str(source), "--num-blocks", "1", "--output", str(tmp_path / "out")])
