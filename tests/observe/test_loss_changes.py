"""What a run has learned and forgotten since its start: the same numbers however often the run was interrupted."""

from __future__ import annotations

import json

import faulty_run
import pytest
import tiny_run

from retemper.engine import pretrain
from retemper.engine.observe.observer import Observer

OPTIONS = ["--training.eval_at_start", "true", "--data.validation_fraction", "0.1"]
NAMES = {"held_out", "held_out/first", "held_out/second", "validation"}


def evaluations(folder):
    """Step, name and values of each recorded evaluation."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(record["step"], record["evaluation"]): record for record in records if "evaluation" in record}


def check_changes(records, start, steps):
    """The records of ``steps`` say how their loss differs from that in ``start``."""
    assert {step for step, _ in records} >= set(steps)
    for (step, name), record in records.items():
        if step:
            assert record["change_since_start"] == record["loss"] - start[0, name]["loss"]


@pytest.fixture(scope="module")
def whole(one_rank, run_file, tmp_path_factory):
    """Records of a run without interruptions, and the lines at its end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    tiny_run.train(one_rank, run_file, [*OPTIONS, "--run_folder", str(folder)])
    return evaluations(folder)


def test_every_evaluation_is_compared_with_that_before_the_first_step(whole):
    assert {name for _, name in whole} == NAMES
    assert all("change_since_start" not in record for (step, _), record in whole.items() if step == 0)
    check_changes(whole, whole, (5, 10, 15, 20))
    assert whole[20, "validation"]["change_since_start"] < -0.1


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_compares_with_the_same_losses(elsewhere, one_rank, run_file, whole, tmp_path):
    options = [*OPTIONS, "--run_folder", str(tmp_path / "run")]
    tiny_run.train_until(one_rank, run_file, options, 9)
    if elsewhere:
        checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
        options = [*OPTIONS, "--run_folder", str(tmp_path / "other"), "--resume", str(checkpoint)]
    tiny_run.train(one_rank, run_file, options)
    records = evaluations(tmp_path / ("other" if elsewhere else "run"))
    for key in [key for key in records if key[0] > 8]:
        assert records[key] == whole[key]
    check_changes(records, whole, (10, 15, 20))


def test_other_text_is_not_compared(one_rank, run_file, tmp_path):
    options = [*OPTIONS, "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file, options, 9)
    tiny_run.train(one_rank, run_file, [*options, "--training.eval_tokens", "100"])
    records = evaluations(tmp_path)
    assert "change_since_start" in records[5, "validation"]
    assert not any("change_since_start" in records[20, name] for name in ("validation", "held_out"))


def test_a_run_that_rolls_back_compares_with_the_same_losses(one_rank, run_file, tmp_path):
    rewinding = ["--training.loss_spike_zscore", "8", "--training.loss_spike_action", "rewind"]
    options = [*OPTIONS, *rewinding, "--training.rewind_steps", "8", "--training.train_tokens", str(44 * 8 * 32)]
    options += ["--checkpoint.save_interval", "6", "--training.micro_batch_size", "8", "--run_folder", str(tmp_path)]
    assert faulty_run.train_on_bad_samples(one_rank, run_file, options, {39 * 8}) is None
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000044" / "manifest.json").read_text())
    assert [rewind["to_step"] for rewind in manifest["health"]["rewinds"]] == [30]
    records = evaluations(tmp_path)
    check_changes(records, records, (35, 40, 44))


class Ends(Observer):
    """Keeps the summary of the end."""

    def __init__(self):
        self.summary = None

    def end(self, summary):
        self.summary = summary


def test_the_end_has_the_changes(one_rank, run_file, tmp_path, capsys):
    run = pretrain.build(tiny_run.configure(run_file, *OPTIONS, "--run_folder", str(tmp_path)), one_rank)
    ends = Ends()
    run.report.observers.append(ends)
    pretrain.train(run)
    records, changes = evaluations(tmp_path), ends.summary["changes"]
    assert changes.keys() == NAMES
    for name, change in changes.items():
        before, after = records[0, name]["loss"], records[20, name]["loss"]
        assert change == {"before": before, "after": after, "change": after - before}
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("validation  ") and "learned" in line)
    assert f"{changes['validation']['before']:.3f}" in row and f"{changes['validation']['change']:+.3f}" in row
