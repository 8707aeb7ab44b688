"""Steps that would do harm are skipped by all ranks alike, counted and bounded; the rest of the run is untouched."""

from __future__ import annotations

import json
import shutil

import faulty_run
import numpy as np
import pytest
import tiny_run
import torch

from retemper.engine.guards.step_guard import robust_zscore

STEPS = 10
SHORT = ["--training.train_tokens", str(STEPS * 8 * 32), "--training.eval_interval", "0"]
LAST = f"checkpoints/step-{STEPS:08d}"


def _same_tensors(one, other):
    actual, expected = tiny_run.tensors_of(one), tiny_run.tensors_of(other)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def _skipped(run_folder):
    return {r["step"]: r["skipped_steps"] for r in tiny_run.records(run_folder) if "evaluation" not in r}


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("gradient", []),
        ("loss", []),
        ("gradient", ["--optimizer.clip_grad_norm", "0"]),
        # Two micro-batches: gradients are added up by a hook.
        (
            "gradient",
            ["--training.micro_batch_size", "2", "--training.weight_dtype", "bf16", "--optimizer.state_dtype", "bf16"],
        ),
    ],
)
def test_a_fault_on_one_rank_is_the_run_without_that_update(fault, options, two_ranks, run_file, tmp_path):
    overrides = [*SHORT, *options, "--run_folder"]
    said = two_ranks.run(faulty_run.train, run_file, [*overrides, str(tmp_path / "faulty")], {6: fault}, 1)
    assert said == [None, None]
    two_ranks.run(faulty_run.train_without, run_file, [*overrides, str(tmp_path / "oracle")], {6})
    _same_tensors(tmp_path / "faulty" / LAST, tmp_path / "oracle" / LAST)
    faulty, oracle = tiny_run.curve(tmp_path / "faulty"), tiny_run.curve(tmp_path / "oracle")
    assert len(faulty) == STEPS + 1
    assert [r for r in faulty if r[0] != 6] == [r for r in oracle if r[0] != 6]
    assert _skipped(tmp_path / "faulty") == {step: int(step >= 6) for step in range(1, STEPS + 1)}


def test_too_many_in_a_row_end_the_run_and_name_the_checkpoint(one_rank, run_file, tmp_path):
    bound = [*SHORT, "--training.max_skipped_steps", "2", "--run_folder"]
    # Not in a row: 2 and then 1 of them are allowed.
    scattered = dict.fromkeys((2, 3, 5), "gradient")
    assert faulty_run.train(one_rank, run_file, [*bound, str(tmp_path / "scattered")], scattered) is None
    said = faulty_run.train(one_rank, run_file, [*bound, str(tmp_path / "row")], dict.fromkeys((5, 6, 7), "gradient"))
    assert said is not None and "3 updates in a row were skipped, more than training.max_skipped_steps 2" in said
    assert said.startswith("step 7: ") and "the newest checkpoint is" in said and "step-00000004" in said


def test_the_bound_holds_between_log_steps_as_well(one_rank, run_file, tmp_path):
    overrides = [*SHORT, "--training.max_skipped_steps", "1", "--logging.log_interval", "9"]
    overrides += ["--checkpoint.save_interval", "100", "--run_folder", str(tmp_path)]
    said = faulty_run.train(one_rank, run_file, overrides, {4: "loss", 5: "loss"})
    assert said is not None and said.startswith("step 9: ") and "2 updates in a row were skipped" in said
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_bound_above_zero_the_first_one_ends_the_run(one_rank, run_file, tmp_path):
    overrides = [*SHORT, "--training.max_skipped_steps", "0", "--run_folder", str(tmp_path)]
    said = faulty_run.train(one_rank, run_file, overrides, {6: "gradient"})
    assert said is not None and said.startswith("step 6: loss ") and "gradient norm nan: not finite; " in said


def test_weights_that_are_not_finite_make_skipping_pointless(one_rank, run_file, tmp_path):
    said = faulty_run.train(one_rank, run_file, [*SHORT, "--run_folder", str(tmp_path)], {6: "weight"})
    assert said is not None and said.startswith("step 6: the update produced weights that are not finite; the newest")


def test_a_checkpoint_may_be_of_a_skipped_step_and_a_resumed_run_goes_on_counting(one_rank, run_file, tmp_path):
    overrides = [*SHORT, "--run_folder"]
    faults = {3: "gradient", 4: "gradient"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert faulty_run.train(one_rank, run_file, [*overrides, str(whole)], faults) is None
    shutil.copytree(whole, broken)
    for step in (8, 10):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    manifest = json.loads((broken / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["health"] == {"skipped_steps": 2, "in_a_row": 2, "losses": []}
    assert faulty_run.train(one_rank, run_file, [*overrides, str(broken)], faults) is None
    assert _skipped(broken) == _skipped(whole) == {step: min(max(step - 2, 0), 2) for step in range(1, STEPS + 1)}
    # With the two before it, a third in a row is one too many.
    for step in (8, 10):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    overrides[:0] = ["--training.max_skipped_steps", "2"]
    said = faulty_run.train(one_rank, run_file, [*overrides, str(broken)], {5: "gradient"})
    assert said is not None and said.startswith("step 5: ") and "3 updates in a row" in said


def test_a_spike_is_skipped_also_by_a_run_that_was_interrupted_just_before(two_ranks, run_file, tmp_path, capfd):
    steps, spike = 44, 40
    base = ["--training.train_tokens", str(steps * 8 * 32), "--training.eval_interval", "0", "--checkpoint.keep_last"]
    base += ["100", "--checkpoint.save_interval", "36", "--run_folder"]
    guard = ["--training.loss_spike_zscore", "8"]
    # The first is no spike yet: there is nothing to compare it with.
    faults = {5: "spike", spike: "spike"}
    whole, broken, last = tmp_path / "whole", tmp_path / "broken", f"checkpoints/step-{steps:08d}"
    two_ranks.run(faulty_run.train, run_file, [*guard, *base, str(whole)], faults)
    assert _skipped(whole) == {step: int(step >= spike) for step in range(1, steps + 1)}
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / last)
    two_ranks.run(faulty_run.train, run_file, [*guard, *base, str(broken)], faults)
    assert tiny_run.curve(broken) == tiny_run.curve(whole)
    _same_tensors(broken / last, whole / last)


def test_robust_zscore():
    """By hand: of 1..7 the median is 4 and the median deviation 2. Of normal samples, it is the z-score."""
    assert robust_zscore(10, range(1, 8)) == pytest.approx(6 / (1.4826 * 2))
    assert robust_zscore(10, [*range(1, 7), 10**6]) == pytest.approx(6 / (1.4826 * 2))
    samples = np.random.default_rng(0).normal(5.0, 0.3, 20_000).tolist()
    assert robust_zscore(6.2, samples) == pytest.approx((6.2 - 5.0) / 0.3, rel=0.03)
    assert robust_zscore(1.0, [1.0] * 9) == 0 < 100 < robust_zscore(1.01, [1.0] * 9)
