"""The exports at the end of a run with an adapter: those of dcp_to_hf, and what transformers and PEFT make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch
from converting import convert_back
from family_models import hf_model
from hf_exports import SHORT
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from retemper.engine.errors import UserError

STEP = "step-00000004"
TOKENS = torch.arange(26).view(2, 13) * 7 % 61


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the vocabulary of the tiny run."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=tiny_run.VOCAB_SIZE, num_key_value_heads=2, **sizes)
    folder = tmp_path_factory.mktemp("base") / "model"
    hf_model(config).save_pretrained(folder)
    return folder


def adapted(base: Path, run_folder: Path, *options: str) -> list[str]:
    """Options of a run of four steps with an adapter."""
    adapter = ["--adapter.kind", "lora", "--adapter.rank", "4", "--adapter.modules_to_save", "[model.norm]"]
    start = ["--model.initialize_from", str(base), "--model.architecture", "null"]
    return [*SHORT, *adapter, *start, "--run_folder", str(run_folder), *options]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def files(folder: Path) -> dict[str, bytes]:
    """All but the record, which has the time of the code."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "conversion.json"}


def test_a_run_exports_both_forms(two_ranks, one_rank, run_file: Path, base: Path, tmp_path: Path, capfd) -> None:
    options = adapted(base, tmp_path / "run", "--adapter.export", "both")
    two_ranks.run(tiny_run.train, run_file, options)
    checkpoint = tmp_path / "run/checkpoints" / STEP
    merged, peft = tmp_path / "run/hf" / STEP, tmp_path / "run/peft" / STEP
    convert_back(checkpoint, tmp_path / "merged")
    convert_back(checkpoint, tmp_path / "peft", adapter=True)
    assert files(merged) == files(tmp_path / "merged") and files(peft) == files(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), peft)
    found, expected = logits(AutoModelForCausalLM.from_pretrained(merged)), logits(loaded)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    assert json.loads((peft / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]

    # the same command again makes what is missing, and no more
    (merged / "conversion.json").rename(tmp_path / "kept")
    for path in merged.iterdir():
        path.unlink()
    merged.rmdir()
    capfd.readouterr()
    tiny_run.train(one_rank, run_file, options)
    assert files(merged) == files(tmp_path / "merged")
    said = capfd.readouterr().out
    assert f"exported    {peft} already exists" in said and f"exported    {merged}:" in said


def test_an_evaluation_starts_from_the_merged_model(one_rank, run_file: Path, base: Path, tmp_path: Path) -> None:
    tiny_run.train(one_rank, run_file, adapted(base, tmp_path / "run", "--adapter.export", "peft"))
    assert not (tmp_path / "run/hf").exists()
    convert_back(tmp_path / "run/checkpoints" / STEP, tmp_path / "merged", dtype="float32")
    losses = []
    for number, start in enumerate((tmp_path / "run", tmp_path / "merged")):
        options = ["--model.initialize_from", str(start), "--model.architecture", "null", *SHORT[:2]]
        tiny_run.train(one_rank, run_file, [*options, "--run_folder", str(tmp_path / f"full {number}")])
        losses.append([record["loss"] for record in tiny_run.records(tmp_path / f"full {number}") if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) >= 4


def test_an_export_that_peft_cannot_load_is_refused_at_the_start(
    one_rank, run_file: Path, base: Path, tmp_path: Path
) -> None:
    rope = ["--model.rope.kind", "yarn", "--model.rope.factor", "4"]
    said = tiny_run.refusal(one_rank, run_file, adapted(base, tmp_path / "run", "--adapter.export", "both", *rope))
    assert said.startswith("adapter.export is both: the run changes ") and "merged model" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"checkpoint\.export_hf is false, so nothing is exported"):
        tiny_run.configure(
            run_file, *adapted(base, tmp_path / "run", "--adapter.export", "peft", "--checkpoint.export_hf", "false")
        )
