"""Resuming: bitwise on the same layout, the same samples on any other, and never from what is incomplete or wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import tiny_run
import torch
from rank_cluster import CPU

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks


def _checkpoints(run_folder):
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def two_rank_reference(two_ranks, run_file, tmp_path_factory):
    """Run folder of the undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    two_ranks.run(tiny_run.train, run_file, ["--run_folder", str(folder)])
    return folder


def test_bitwise_equal_after_two_interruptions(two_ranks, run_file, two_rank_reference, tmp_path):
    overrides = ["--run_folder", str(tmp_path)]
    two_ranks.run(tiny_run.train_until, run_file, overrides, 6)
    two_ranks.run(tiny_run.train_until, run_file, overrides, 11)
    assert _checkpoints(tmp_path) == ["step-00000004", "step-00000008"]
    two_ranks.run(tiny_run.train, run_file, overrides)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(two_rank_reference)
    expected = tiny_run.tensors_of(two_rank_reference / "checkpoints" / "step-00000020")
    actual = tiny_run.tensors_of(tmp_path / "checkpoints" / "step-00000020")
    assert actual.keys() == expected.keys()
    assert sum(name.startswith("optimizer.") for name in actual) == 3 * sum("optimizer" not in name for name in actual)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("cluster", ["one_rank", pytest.param("four_ranks", marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    cluster, request, two_ranks, run_file, reference, tmp_path
):
    overrides = ["--run_folder", str(tmp_path), "--training.micro_batch_size", "2"]
    two_ranks.run(tiny_run.train_until, run_file, overrides, 9)
    ranks = request.getfixturevalue(cluster)
    if isinstance(ranks, Ranks):
        tiny_run.train(ranks, run_file, overrides)
    else:
        ranks.run(tiny_run.train, run_file, overrides)
    actual, expected = tiny_run.curve(tmp_path), tiny_run.curve(reference)
    assert [r[:2] for r in actual] == [r[:2] for r in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one[2:] == pytest.approx(other[2:], rel=1e-5)


def test_a_longer_budget_continues_in_the_same_order(one_rank, run_file, tmp_path):
    """With a constant rate, a run that was extended is the run that had been longer from the start."""
    overrides = [
        "--optimizer.schedule",
        "constant",
        "--training.eval_interval",
        "0",
        "--checkpoint.save_interval",
        "100",
    ]
    long, short = tmp_path / "long", tmp_path / "short"
    tiny_run.train(one_rank, run_file, [*overrides, "--run_folder", str(long)])
    half = str(10 * 8 * 32)
    tiny_run.train(one_rank, run_file, [*overrides, "--run_folder", str(short), "--training.train_tokens", half])
    tiny_run.train(one_rank, run_file, [*overrides, "--run_folder", str(short)])
    assert [r for r in tiny_run.curve(short) if r[1] == "train"] == [r for r in tiny_run.curve(long) if r[1] == "train"]


def test_a_checkpoint_holds_fp32_masters_though_blocks_stay_gathered_and_compute_is_bf16(two_ranks, run_file, tmp_path):
    overrides = ["--run_folder", str(tmp_path), "--training.precision", "bf16", "--training.eval_interval", "4"]
    two_ranks.run(tiny_run.train, run_file, [*overrides, "--parallel.reshard_after_forward", "false"])
    tensors = tiny_run.tensors_of(tmp_path / "checkpoints" / "step-00000020")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    weights = tensors["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())


_EVERY_4 = "the best by validation among the checkpoints saved at an evaluation (every 4 steps and at the end)"


@pytest.mark.parametrize(
    ("keep_best", "rule", "saved", "best"),
    [
        ("true", f", {_EVERY_4}", [4, 8, 12, 16, 20], 12),
        ("improved", ", the best by validation, saved after every evaluation with a new lowest loss",
         [2, 4, 6, 8, 12, 16, 20], 6),
        ("false", "", [4, 8, 12, 16, 20], 6),
    ],
)  # fmt: skip
def test_retention_keeps_the_newest_and_the_best(keep_best, rule, saved, best, one_rank, run_file, tmp_path, capsys):
    losses = {2: 5.0, 4: 4.0, 6: 3.0, 8: 3.5, 10: 3.6, 12: 3.2, 14: 3.1, 16: 3.4, 18: 3.3, 20: 3.9}
    overrides = ["--run_folder", str(tmp_path), "--checkpoint.keep_last", "1", "--checkpoint.keep_best", keep_best]
    run = pretrain.build(tiny_run.configure(run_file, *overrides, "--training.eval_interval", "2"), one_rank)
    run.validation.evaluate = lambda *_: {"validation": losses[run.progress.step]}
    pretrain.train(run)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line[-8:]) for line in lines if line.startswith("  saved ")] == saved
    assert _checkpoints(tmp_path) == [f"step-{best:08d}"] * (keep_best != "false") + ["step-00000020"]
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert (manifest["best"]["step"], manifest["best"]["loss"]) == (best, losses[best])
    assert f"keeps       the newest{rule}" in lines


def test_what_a_killed_save_left_is_passed_over_and_removed(one_rank, run_file, reference, tmp_path):
    overrides = ["--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file, overrides, 6)
    checkpoints = tmp_path / "checkpoints"
    half_written = checkpoints / f".step-00000008.{'0' * 32}.tmp"
    shutil.copytree(checkpoints / "step-00000004", half_written)
    incomplete = checkpoints / "step-00000009"
    shutil.copytree(checkpoints / "step-00000004", incomplete)
    (incomplete / "manifest.json").unlink()
    tiny_run.train(one_rank, run_file, overrides)
    assert not half_written.exists()
    assert tiny_run.curve(tmp_path) == tiny_run.curve(reference)


def test_a_finished_run_has_nothing_to_do(one_rank, run_file, reference, capsys):
    before = (reference / "metrics.jsonl").read_bytes(), _checkpoints(reference)
    tiny_run.train(one_rank, run_file, ["--run_folder", str(reference)])
    assert "0 steps to go" in capsys.readouterr().out
    assert ((reference / "metrics.jsonl").read_bytes(), _checkpoints(reference)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_ends_the_run(number, one_rank, run_file, reference, tmp_path, capsys):
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path)), one_rank)

    def signal_itself():
        if run.progress.step == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # launchers repeat signals

    tiny_run.before_step(run, signal_itself)
    pretrain.train(run)
    assert _checkpoints(tmp_path) == ["step-00000004", "step-00000006"]
    assert "stopped at step 6" in capsys.readouterr().out
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    tiny_run.train(one_rank, run_file, ["--run_folder", str(tmp_path)])
    assert tiny_run.curve(tmp_path) == tiny_run.curve(reference)


@pytest.fixture(scope="module")
def interrupted(one_rank, run_file, tmp_path_factory):
    """Run folder of a run that was left at step 6, with a checkpoint at step 4."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder)], 6)
    return folder


def test_weights_that_the_update_broke_are_never_saved(one_rank, run_file, tmp_path):
    """Loss and gradients of the step are finite: they are of the weights before it."""
    overrides = ["--run_folder", str(tmp_path), "--checkpoint.keep_last", "1", "--training.warmup_tokens", "0"]
    tiny_run.train_until(one_rank, run_file, overrides, 5)
    # Without an evaluation, which would notice first, the check of the weights stands alone.
    overrides += ["--training.eval_interval", "0", "--checkpoint.save_interval", "1"]
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)
    update = run.optimizer.step

    def broken_update():
        update()
        with torch.no_grad():
            next(iter(run.model.parameters())).mul_(float("inf"))

    run.optimizer.step = broken_update
    with pytest.raises(UserError, match=r"step 5: the update produced weights .* checkpoint is .*step-00000004"):
        pretrain.train(run)
    assert _checkpoints(tmp_path) == ["step-00000004"]


def test_a_validation_loss_that_is_not_finite_is_never_the_best(one_rank, run_file, tmp_path):
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(tmp_path)), one_rank)
    run.validation.evaluate = lambda *_: {"validation": float("nan")}
    with pytest.raises(UserError, match="step 5: validation loss of validation nan: not finite"):
        pretrain.train(run)
    assert _checkpoints(tmp_path) == ["step-00000004"]


def test_a_folder_without_its_manifest_is_not_passed_over_for_a_fresh_start(one_rank, run_file, interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    (folder / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    assert "step-00000004: manifest.json is missing" in _refused(one_rank, run_file, "--run_folder", str(folder))


def test_common_mistakes_are_told_what_to_name(one_rank, run_file, interrupted, tmp_path):
    message = _refused(one_rank, run_file, "--run_folder", str(tmp_path / "x"), "--resume", str(interrupted))
    assert "name one of the checkpoints in it, such as" in message and message.endswith("step-00000004")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    options = ["--run_folder", str(tmp_path / "x"), "--resume", str(tmp_path / "hf")]
    assert "convert it with checkpoint_convert/hf_to_dcp.py" in _refused(one_rank, run_file, *options)


def test_a_disk_that_refuses_ends_every_rank_in_one_line(two_ranks, run_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    messages = two_ranks.run(tiny_run.refusal, run_file, ["--run_folder", str(tmp_path / "file")])
    assert messages[1] == f"rank 0: {messages[0]}"
    assert str(tmp_path / "file") in messages[0]


def test_bad_data_on_one_rank_ends_every_rank_in_one_line(two_ranks, run_file, tmp_path):
    """A token outside the vocabulary in a single window, which the start finds on all ranks alike."""
    tiny_run.write_dataset(tmp_path / "first", seed=0)
    tokens = np.memmap(tmp_path / "first.bin", dtype=np.uint16, mode="r+")
    tokens[len(tokens) // 2] = 1000
    tokens.flush()
    options = ["--run_folder", str(tmp_path / "run"), "--data.train", f"[{{path: {tmp_path / 'first'}}}]"]
    messages = two_ranks.run(tiny_run.refusal, run_file, options)
    assert "token id 1000 at token" in messages[0] and messages[0] == messages[1]
    assert not (tmp_path / "run").exists()


def test_a_bad_token_in_a_validation_set_is_refused_before_the_training(one_rank, run_file, tmp_path):
    tiny_run.write_dataset(tmp_path / "bad", seed=3, token=1000)
    options = ["--run_folder", str(tmp_path / "run"), "--data.validation.bad", str(tmp_path / "bad")]
    message = _refused(one_rank, run_file, *options)
    assert "bad.bin: token id 1000" in message and "vocabulary of 97" in message
    assert not (tmp_path / "run").exists()


def _refused(one_rank, run_file, *overrides):
    with pytest.raises(UserError) as error:
        pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)
    return str(error.value)


def test_refused_resumes(one_rank, run_file, interrupted, tmp_path):
    here = ["--run_folder", str(interrupted)]
    checkpoint = interrupted / "checkpoints" / "step-00000004"
    assert "tmp-none: no such checkpoint" in _refused(one_rank, run_file, *here, "--resume", "tmp-none")
    assert "manifest.json is missing" in _refused(one_rank, run_file, *here, "--resume", str(tmp_path))
    assert "resume is none" in _refused(one_rank, run_file, *here, "--resume", "none")
    assert "seed is 7" in _refused(one_rank, run_file, *here, "--seed", "7")
    message = _refused(one_rank, run_file, *here, "--training.sequence_length", "16")
    assert "training.sequence_length is 16" in message and "trained with 32" in message
    message = _refused(one_rank, run_file, *here, "--model.architecture.num_hidden_layers", "3")
    assert "num_layers 3 is 2 there" in message
    newer = tmp_path / "run"
    shutil.copytree(interrupted, newer)
    shutil.copytree(checkpoint, newer / "checkpoints" / "step-00000008")
    manifest = newer / "checkpoints" / "step-00000008" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 8'))
    message = _refused(one_rank, run_file, "--run_folder", str(newer), "--resume", str(checkpoint))
    assert "step-00000008 is newer" in message


def test_other_data_under_the_same_name_is_refused(one_rank, run_file, interrupted, tmp_path):
    tiny_run.write_dataset(tmp_path / "first", seed=5)
    sources = f"[{{path: {tmp_path / 'first'}}}, {{path: {run_file.parent / 'second'}}}]"
    message = _refused(one_rank, run_file, "--run_folder", str(interrupted), "--data.train", sources)
    assert "data source 'first'" in message and "differs from the one" in message


def test_a_damaged_checkpoint_is_refused_in_one_line(one_rank, run_file, interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    shard = next((folder / "checkpoints" / "step-00000004").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "step-00000004" in _refused(one_rank, run_file, "--run_folder", str(folder))


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(one_rank, run_file, tmp_path):
    overrides = ["--run_folder", str(tmp_path), "--optimizer.clip_grad_norm", "0", "--optimizer.beta2", "0"]
    overrides += ["--training.max_skipped_steps", "0"]
    run = pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)

    def poison():
        if run.progress.step == 5:
            with torch.no_grad():
                next(iter(run.model.parameters())).fill_(float("nan"))

    tiny_run.before_step(run, poison)
    with pytest.raises(UserError, match="step 6: loss nan"):
        pretrain.train(run)
    assert _checkpoints(tmp_path) == ["step-00000004"]


def test_new_sources_join_a_run_and_old_ones_go_on_from_their_place(one_rank, run_file, interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    tiny_run.write_dataset(tmp_path / "third", seed=9)
    sources = f"[{{path: {tmp_path / 'third'}}}, {{path: {run_file.parent / 'first'}}}]"
    former = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(interrupted)), Ranks(0, 1, CPU)).order
    order = pretrain.build(
        tiny_run.configure(run_file, "--run_folder", str(folder), "--data.train", sources), one_rank
    ).order
    consumed = 4 * 8
    given = former.cursors(consumed)["first"]
    assert order.cursors(consumed) == {**former.cursors(consumed), "third": 0}
    first_again = next(s for s in (order.sample(i) for i in range(consumed, consumed + 8)) if s.source == 1)
    former_next = [s for s in (former.sample(i) for i in range(200)) if s.source == 0][given]
    assert first_again.chunk == former_next.chunk
