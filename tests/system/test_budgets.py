"""Runs whose length is in epochs, and runs that stop early: the same steps on all ranks, and exact resumes."""

from __future__ import annotations

import pytest
import tiny_run
import torch
import yaml

from retemper.engine import pretrain
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.observe.start_summary import describe_start
from retemper.engine.weights.checkpoint.manifest import read_manifest
from retemper.tools.reports.run import read_run
from retemper.tools.reports.run_page import run_facts

EPOCHS = ["--training.train_epochs", "0.3", "--training.warmup_ratio", "0.25"]


def _tokens_of_the_data(run_file) -> int:
    """Tokens in whole sequences of 32, each with a target after its last token, counted from the files."""
    datasets = [IndexedDataset(str(run_file.parent / name)) for name in ("first", "second")]
    return sum((dataset.num_tokens - 1) // 32 * 32 for dataset in datasets)


def test_a_run_of_epochs_is_the_run_of_their_tokens_also_when_it_is_resumed(two_ranks, run_file, tmp_path):
    tokens = -(-3 * _tokens_of_the_data(run_file) // 10)
    steps = -(-tokens // 256)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    in_tokens = ["--training.train_tokens", str(tokens), "--training.warmup_tokens", str(round(tokens / 4))]
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(whole), *in_tokens])
    two_ranks.run(tiny_run.train_until, run_file, ["--run_folder", str(resumed), *EPOCHS], 6)
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(resumed), *EPOCHS])
    assert tiny_run.curve(resumed) == tiny_run.curve(whole) and tiny_run.curve(whole)[-1][0] == steps
    last = [folder / "checkpoints" / f"step-{steps:08d}" for folder in (resumed, whole)]
    actual, expected = (tiny_run.tensors_of(checkpoint) for checkpoint in last)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    saved = read_manifest(last[0])
    assert saved.final and saved.config["training"]["train_tokens"] == tokens
    written = yaml.safe_load((resumed / "config.yaml").read_text())["training"]
    assert (written["train_epochs"], written["train_tokens"], written["warmup_tokens"]) == (0.3, None, None)


def test_the_start_says_what_the_epochs_are(one_rank, run_file, tmp_path, capsys):
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path), *EPOCHS), one_rank)
    [budget] = [line for line in describe_start(run) if line.startswith("budget ")]
    tokens = _tokens_of_the_data(run_file)
    assert f"0.3 x {tokens:,} = {-(-3 * tokens // 10):,} tokens = " in budget
    assert f"warm-up {round(-(-3 * tokens // 10) / 4):,} tokens (warmup_ratio 0.25); " in budget


def test_a_decay_in_steps_is_the_one_in_tokens_and_is_shown(one_rank, run_file, tmp_path):
    """The last 4 of 12 steps fall from the peak to the minimum in equal parts, also after a resume."""
    wsd = [*("--optimizer.schedule", "wsd", "--optimizer.learning_rate", "1e-3"), "--training.train_steps", "12"]
    wsd += ["--training.warmup_tokens", "0", "--optimizer.min_learning_rate", "2e-4", "--optimizer.decay_steps", "4"]
    overrides = ["--run_folder", str(tmp_path), *wsd]
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)
    [budget] = [line for line in describe_start(run) if line.startswith("budget ")]
    assert ", decay 1,024 tokens (decay_steps 4); " in budget
    tiny_run.train_until(one_rank, run_file, overrides, 10)
    tiny_run.train(one_rank, run_file, overrides)
    rates = [record["learning_rate"] for record in tiny_run.records(tmp_path) if "learning_rate" in record]
    assert rates == pytest.approx([1e-3] * 8 + [8e-4, 6e-4, 4e-4, 2e-4])
    optimizer = yaml.safe_load((tmp_path / "config.yaml").read_text())["optimizer"]
    assert (optimizer["decay_steps"], optimizer["decay_tokens"]) == (4, None)


def test_a_longer_run_in_epochs_continues(one_rank, run_file, tmp_path):
    """A changed budget is a change like any other: the schedule is that of the longer run from then on."""
    overrides = ["--run_folder", str(tmp_path), "--training.eval_interval", "0", "--optimizer.schedule", "constant"]
    tiny_run.train(one_rank, run_file, [*overrides, "--training.train_steps", "4"])
    tiny_run.train(one_rank, run_file, [*overrides, "--training.train_epochs", "0.2"])
    steps = -(-2 * _tokens_of_the_data(run_file) // 2560)
    assert [record[0] for record in tiny_run.curve(tmp_path) if record[1] == "train"] == list(range(1, steps + 1))
    assert read_manifest(tmp_path / "checkpoints" / f"step-{steps:08d}").final


BY_EPOCH = [
    *("--training.train_epochs", "2.5", "--training.global_batch_size", "32", "--training.eval_interval", "epoch"),
    *("--checkpoint.save_interval", "epoch", "--checkpoint.keep_last", "9"),
]


def test_it_saves_and_evaluates_at_the_end_of_every_epoch_also_after_a_resume(two_ranks, run_file, tmp_path):
    epoch, per_step = _tokens_of_the_data(run_file), 32 * 32
    ends = [-(-tokens // per_step) for tokens in (epoch, 2 * epoch, -(-5 * epoch // 2))]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(whole), *BY_EPOCH])
    two_ranks.run(tiny_run.train_until, run_file, ["--run_folder", str(resumed), *BY_EPOCH], ends[0] + 3)
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(resumed), *BY_EPOCH])
    for folder in (whole, resumed):
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{end:08d}" for end in ends]
        records = tiny_run.records(folder)
        assert [record["step"] for record in records if "evaluation" in record] == ends
        steps = [record for record in records if "evaluation" not in record]
        assert [record["epoch"] for record in steps] == [record["step"] * per_step / epoch for record in steps]
    assert tiny_run.curve(resumed) == tiny_run.curve(whole)


# ----------------------------------------------------------------------------------------------------------------------
# Early stopping. No loss falls by 100: of the evaluations at steps 5, 10 and 15, the second and third do not improve.

EARLY = ["--training.early_stopping", "{patience: 2, min_delta: 100.0}"]


def test_all_ranks_stop_early_at_the_same_step_also_after_a_resume(two_ranks, run_file, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(whole), *EARLY])
    two_ranks.run(tiny_run.train_until, run_file, ["--run_folder", str(resumed), *EARLY], 13)
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(resumed), *EARLY])
    assert tiny_run.curve(resumed) == tiny_run.curve(whole)
    last = [folder / "checkpoints" / "step-00000015" for folder in (resumed, whole)]
    actual, expected = (tiny_run.tensors_of(checkpoint) for checkpoint in last)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    one, other = map(read_manifest, last)
    assert one.final and one.early_stopping == other.early_stopping
    assert one.early_stopping["evaluations"] == 2 and one.early_stopping["loss"] == min(
        loss for _, kind, loss, *_ in tiny_run.curve(whole) if kind == "validation"
    )


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"context": 2}, {"pipeline": 2}])
def test_it_stops_early_in_every_layout(layout, two_ranks, run_file, tmp_path):
    """The last stage of a pipeline has the losses; all ranks must decide alike, or the run would hang."""
    [(axis, size)] = layout.items()
    overrides = [f"--parallel.{axis}", str(size), "--training.micro_batch_size", "2", "--training.eval_interval", "2"]
    overrides += ["--model.architecture.vocab_size", "98"]  # tensor parallelism divides it
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(tmp_path), *EARLY, *overrides])
    assert read_manifest(tmp_path / "checkpoints" / "step-00000006").final


def test_a_stopped_run_stays_stopped_until_it_gets_more_patience(one_rank, run_file, tmp_path, capsys):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    overrides = ["--run_folder", str(stopped), "--checkpoint.export_hf", "true"]
    tiny_run.train(one_rank, run_file, [*overrides, *EARLY])
    curve = tiny_run.curve(stopped)
    assert curve[-1][0] == 15 and (stopped / "hf" / "step-00000015" / "model.safetensors").is_file()
    capsys.readouterr()
    tiny_run.train(one_rank, run_file, [*overrides, *EARLY])
    log = capsys.readouterr().out
    assert "note: stopped early: " in log and "raise training.early_stopping.patience or set it to null" in log
    assert tiny_run.curve(stopped) == curve
    assert run_facts(read_run(stopped))["state"] == "stopped early"
    tiny_run.train(one_rank, run_file, [*overrides, "--training.early_stopping", "{patience: 3, min_delta: 100.0}"])
    tiny_run.train(one_rank, run_file, ["--run_folder", str(whole)])
    assert tiny_run.curve(stopped) == tiny_run.curve(whole)
    assert run_facts(read_run(stopped))["state"] == "finished"


def test_a_run_without_that_set_is_refused_before_anything_is_written(one_rank, run_file, tmp_path):
    folder = tmp_path / "run"
    line = tiny_run.refusal(
        one_rank, run_file, ["--run_folder", str(folder), "--training.early_stopping", "{patience: 2, metric: x}"]
    )
    assert line == "training.early_stopping.metric is x, but the validation sets are validation; name one of them"
    assert not folder.exists()
