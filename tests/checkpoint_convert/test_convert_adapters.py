"""Checkpoints with an adapter become merged Hugging Face folders and folders of PEFT, or are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_files import save_adapter
from converting import convert_back, convert_there, edit_tensors, logits
from family_models import hf_config, hf_model
from peft import PeftModel
from saved_runs import rewrite_manifest
from tiny_models import edit_json
from transformers import AutoModelForCausalLM

from retemper.checkpoint_convert.dcp_to_hf import parse_arguments
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.tools import checkpoint as checkpoint_command
from retemper.tools.generation.model_loading import find_model, load_backend, read_architecture


@pytest.fixture
def base(tmp_path: Path) -> Path:
    hf_model(hf_config("qwen2 tied")).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path, one_rank: Ranks) -> Path:
    """A training checkpoint of an adapter for ``base``."""
    return save_adapter(base, tmp_path / "run", one_rank)


def test_the_manifest_records_the_base(checkpoint: Path, base: Path) -> None:
    record = read_manifest(checkpoint).base
    assert record["folder"] == str(base.resolve()) and len(record["hash"]) == 32
    assert "base" not in json.loads((checkpoint / "manifest.json").read_text())["config"]


def test_merged_folder_and_peft_folder_compute_the_same(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    said = convert_back(checkpoint, tmp_path / "merged", verify=True)
    assert any(line.startswith("verified: logits differ from transformers") for line in said)
    convert_back(checkpoint, tmp_path / "peft", adapter=True)
    names = {path.name for path in (tmp_path / "peft").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "conversion.json"}
    # transformers finds the base by itself
    merged, loaded = logits(tmp_path / "merged"), logits(tmp_path / "peft")
    assert not torch.allclose(merged, logits(base), rtol=0, atol=1e-2)
    assert (merged - loaded).abs().max() <= 1e-5 * merged.abs().max()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    state = model.merge_and_unload().state_dict()
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        assert (parameter - state[name]).abs().max() <= 1e-6, name


def test_records_name_adapter_and_base(checkpoint: Path, tmp_path: Path) -> None:
    convert_back(checkpoint, tmp_path / "merged")
    proof = json.loads((tmp_path / "merged/conversion.json").read_text())
    assert proof["source"]["base"] == read_manifest(checkpoint).base
    assert all(name.startswith("optimizer.") for name in proof["left_out"]["state of the optimizer"])
    convert_back(checkpoint, tmp_path / "peft", adapter=True, dtype="bfloat16")
    proof = json.loads((tmp_path / "peft/conversion.json").read_text())
    assert proof["options"] == {"dtype": "bfloat16", "adapter": True}
    assert {item["to"]["dtype"] for item in proof["tensors"].values()} == {"bfloat16"}


def test_a_base_that_was_saved_again_or_converted_is_the_same(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    convert_there(base, tmp_path / "converted")
    shutil.rmtree(base)
    for name in ("again", "converted"):
        convert_back(checkpoint, tmp_path / f"from {name}", base=str(tmp_path / name))
    assert torch.equal(logits(tmp_path / "from again"), logits(tmp_path / "from converted"))
    with pytest.raises(UserError, match="converted is a checkpoint, which PEFT cannot load; convert it with"):
        convert_back(checkpoint, tmp_path / "peft", base=str(tmp_path / "converted"), adapter=True)


def test_a_base_that_is_an_adapter_itself(checkpoint: Path, base: Path, tmp_path: Path, one_rank: Ranks) -> None:
    convert_back(checkpoint, tmp_path / "first", dtype="float32")
    second = save_adapter(tmp_path / "first", tmp_path / "second", one_rank, start=checkpoint)
    convert_back(second, tmp_path / "by adapter")
    convert_back(second, tmp_path / "by folder", base=str(tmp_path / "first"))
    assert torch.equal(logits(tmp_path / "by adapter"), logits(tmp_path / "by folder"))


def refusal(checkpoint: Path, output: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        convert_back(checkpoint, output, **options)
    assert "\n" not in str(caught.value) and not output.exists()
    return str(caught.value)


def test_a_base_that_is_gone_or_changed_is_refused(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    edit_tensors(tmp_path / "other" / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.001))
    said = refusal(checkpoint, tmp_path / "out", base=str(tmp_path / "other"))
    assert "other: not the base model that the adapter was trained on: the hash of its weights is" in said
    base.rename(tmp_path / "moved")
    said = refusal(checkpoint, tmp_path / "out")
    assert f"holds an adapter and needs its base model: {base.resolve()}: no such folder; put it back, or name" in said
    assert "name another folder" in refusal(checkpoint, tmp_path / "out", base=str(tmp_path / "nowhere"))
    convert_back(checkpoint, tmp_path / "out", base=str(tmp_path / "moved"))
    peft = tmp_path / "peft"
    convert_back(checkpoint, peft, base=str(tmp_path / "moved"), adapter=True)
    config = json.loads((peft / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "moved").resolve())


def test_a_changed_configuration_has_no_form_in_peft(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    edit_json(base / "config.json", lambda config: config.update(rope_parameters=rope))
    said = refusal(checkpoint, tmp_path / "out", adapter=True)
    assert "of the base model, which an adapter of PEFT cannot do; export the merged model instead" in said


def test_a_folder_with_all_parameters_has_no_adapter(base: Path, tmp_path: Path) -> None:
    convert_there(base, tmp_path / "whole")
    assert "holds all parameters and no adapter" in refusal(tmp_path / "whole", tmp_path / "out", adapter=True)
    assert "--base x:" in refusal(tmp_path / "whole", tmp_path / "out", base="x")


def test_a_manifest_with_unknown_settings_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    rewrite_manifest(checkpoint, lambda content: content["config"]["adapter"].update(magic=1))
    assert "known are" in refusal(checkpoint, tmp_path / "out")
    rewrite_manifest(checkpoint, lambda content: content["config"]["adapter"].update(rank=8) or
                     content["config"]["adapter"].pop("magic"))  # fmt: skip
    assert "belongs to another model or adapter" in refusal(checkpoint, tmp_path / "out")


def test_options_without_effect_on_a_folder_of_peft(tmp_path: Path) -> None:
    words = ["--checkpoint", "x", "--output", str(tmp_path / "y"), "--adapter"]
    assert parse_arguments(words).adapter
    for option in (["--verify"], ["--vocab-size", "7"], ["--max-shard-size", "1GB"], ["--carried-from", "z"]):
        with pytest.raises(UserError, match=f"^{option[0]} has no effect with --adapter; remove one of them$"):
            parse_arguments([*words, *option])


def test_generation_merges_the_adapter(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    model = find_model(checkpoint.parent.parent)
    backend = load_backend(model, read_architecture(model), "float32", torch.device("cpu"))
    convert_back(checkpoint, tmp_path / "merged")
    tokens = (torch.arange(40).view(2, 20) * 7 % 97).tolist()
    found, expected = backend.compute(tokens), logits(tmp_path / "merged")[:, -1]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    edit_tensors(base / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.001))
    with pytest.raises(UserError, match="not the base model that the adapter was trained on"):
        load_backend(model, read_architecture(model), "float32", torch.device("cpu"))


def test_the_checkpoint_tool_knows_adapters(
    checkpoint: Path, base: Path, tmp_path: Path, one_rank: Ranks, capsys
) -> None:
    second = save_adapter(base, tmp_path / "second", one_rank)
    assert checkpoint_command.main(["verify", str(checkpoint)]) == 0
    assert f"an adapter for {base.resolve()}, which is not verified" in capsys.readouterr().out
    assert checkpoint_command.main(["ls", str(checkpoint.parent.parent)]) == 0
    assert "complete, an adapter" in capsys.readouterr().out
    assert checkpoint_command.main(["diff", str(checkpoint), str(second)]) == 0
    rewrite_manifest(second, lambda content: content["base"].update(hash="0" * 32))
    assert checkpoint_command.main(["diff", str(checkpoint), str(second)]) == 1
    assert f'base.hash: "{read_manifest(checkpoint).base["hash"]}" | "{"0" * 32}"' in capsys.readouterr().out
    assert checkpoint_command.main(["upgrade", str(checkpoint)]) == 0
