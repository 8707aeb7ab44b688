"""Runs whose length is in epochs, and runs that stop early: the same steps on all ranks, and exact resumes."""

from __future__ import annotations

import tiny_run
import torch
import yaml

from retemper.engine import pretrain
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.weights.checkpoint.manifest import read_manifest

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
    log = (resumed / "log.txt").read_text() if (resumed / "log.txt").exists() else ""
    assert "error" not in log


def test_the_start_says_what_the_epochs_are(one_rank, run_file, tmp_path, capsys):
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path), *EPOCHS), one_rank)
    from retemper.engine.observe.start_summary import describe_start

    [budget] = [line for line in describe_start(run) if line.startswith("budget ")]
    tokens = _tokens_of_the_data(run_file)
    assert f"0.3 x {tokens:,} = {-(-3 * tokens // 10):,} tokens = " in budget


def test_a_longer_run_in_epochs_continues(one_rank, run_file, tmp_path):
    """A changed budget is a change like any other: the schedule is that of the longer run from then on."""
    overrides = ["--run_folder", str(tmp_path), "--training.eval_interval", "0", "--optimizer.schedule", "constant"]
    tiny_run.train(one_rank, run_file, [*overrides, "--training.train_steps", "4"])
    tiny_run.train(one_rank, run_file, [*overrides, "--training.train_epochs", "0.2"])
    steps = -(-2 * _tokens_of_the_data(run_file) // 2560)
    assert [record[0] for record in tiny_run.curve(tmp_path) if record[1] == "train"] == list(range(1, steps + 1))
    assert read_manifest(tmp_path / "checkpoints" / f"step-{steps:08d}").final
