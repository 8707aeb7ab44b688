"""Settings that a run's start decides on: what it starts from, its precision, a budget that is used up."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_run

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.parallel import precision


def said(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def evaluations(run_folder) -> list[tuple]:
    return [record for record in tiny_run.curve(run_folder) if record[1] != "train"]


def test_a_finished_run_evaluates_when_asked_to(one_rank, run_file, reference, tmp_path, capsys):
    """The loss is that of the same weights before, and is recorded once."""
    folder = tiny_run.copy_of(reference, tmp_path / "run")
    before = evaluations(folder)
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder)])
    assert not any("evaluation of" in line for line in said(capsys))
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), "--training.eval_at_start", "true"])
    [line] = [line for line in said(capsys) if "evaluation of" in line]
    assert f"evaluation of validation at step 20: loss {before[-1][2]:.4f}" in line
    assert evaluations(folder) == before
    # A set that the run did not have before.
    options = ["--data.validation.first", str(run_file.parent / "first"), "--training.eval_at_start", "true"]
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *options])
    assert [record[1] for record in evaluations(folder)[-2:]] == ["validation", "first"]
    assert (folder / "checkpoints" / "step-00000020").is_dir()


@pytest.mark.parametrize(("tokens", "noted"), [(20 * 8 * 32 - 1, False), (15 * 8 * 32, True)])
def test_a_budget_below_what_is_done_is_noted(one_rank, run_file, reference, tmp_path, capsys, tokens, noted):
    folder = tiny_run.copy_of(reference, tmp_path / "run")
    options = ["--training.train_tokens", str(tokens), "--training.eval_interval", "0"]
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *options])
    text = f"note: training.train_tokens {tokens:,} is less than the 5,120 tokens that this run has trained on"
    assert any(line.startswith(text) for line in said(capsys)) == noted


def test_the_folder_of_a_run_means_its_newest_checkpoint(one_rank, run_file, reference, tmp_path, capsys):
    options = ["--model.architecture", "null", "--training.train_tokens", "256", "--training.warmup_tokens", "0"]
    tails = []
    newest = str(max(reference.glob("checkpoints/step-*")))
    for name, start in (("run", str(reference)), ("checkpoint", newest)):
        overrides = ["--run_folder", str(tmp_path / name), "--model.initialize_from", start, *options]
        tiny_run.train(one_rank, run_file, overrides)
        tails.append(tiny_run.curve(tmp_path / name))
        lines = said(capsys)
        assert any(f"weights of {start}" in line and newest in line for line in lines if line.startswith("model"))
    assert tails[0] == tails[1]
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000001/manifest.json").read_text())
    assert manifest["config"]["model"]["initialize_from"] == str(reference)


def test_the_folder_of_a_run_without_checkpoints_is_refused(one_rank, run_file, reference, tmp_path):
    """An older checkpoint is not taken in place of a damaged one, nor half a checkpoint for a whole."""
    folder = tiny_run.copy_of(reference, tmp_path / "run")
    newest = max(folder.glob("checkpoints/step-*"))
    options = ["--run_folder", str(tmp_path / "new"), "--model.initialize_from", str(folder)]
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    assert str(newest) in tiny_run.refusal(one_rank, run_file, options)
    for checkpoint in folder.glob("checkpoints/step-*"):
        (checkpoint / "manifest.json").unlink()
    message = tiny_run.refusal(one_rank, run_file, options)
    assert message == f"{folder}: the folder of a run without a complete checkpoint; name a checkpoint"
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    assert not (tmp_path / "new").exists()


def test_a_resumed_run_says_that_its_precision_and_start_have_changed(
    one_rank, run_file, reference, tmp_path, capsys, monkeypatch
):
    folder = tiny_run.copy_of(reference, tmp_path / "run")
    monkeypatch.setattr(precision, "native_bf16", lambda device: "this CPU has it")
    options = ["--training.precision", "auto", "--training.train_tokens", str(21 * 8 * 32)]
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *options, "--model.initialize_from", "elsewhere"])
    lines = said(capsys)
    assert "changed     training.precision fp32 -> bf16" in lines
    assert any(line.startswith("ranks") and "compute in bf16 (auto: this CPU has it)" in line for line in lines)
    assert any(line.startswith("note: model.initialize_from elsewhere has no effect: the run conti") for line in lines)
    manifest = json.loads((folder / "checkpoints/step-00000021/manifest.json").read_text())
    assert manifest["config"]["training"]["precision"] == "bf16"
    # On a machine without it, the same configuration continues in fp32, and says so.
    monkeypatch.setattr(precision, "native_bf16", lambda device: None)
    options[-1] = str(22 * 8 * 32)
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *options])
    lines = said(capsys)
    assert "changed     training.precision bf16 -> fp32" in lines
    assert any("compute in fp32 (auto: the CPU has no native bf16)" in line for line in lines)
