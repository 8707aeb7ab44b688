"""A run whose newest checkpoint is damaged goes on from the one before, as if it had never got further."""

from __future__ import annotations

import shutil

import old_format
import pytest
import tiny_run

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.files.lock import run_folder_lock
from retemper.tools.checkpoint_report.upgrading import upgrade


@pytest.fixture(scope="module")
def interrupted(one_rank, run_file, tmp_path_factory):
    """Run folder of a run that was left at step 10, with checkpoints at the steps 4 and 8."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    tiny_run.train_until(one_rank, run_file, ["--run_folder", str(folder)], 10)
    return folder


@pytest.fixture
def damaged(interrupted, tmp_path):
    """A copy of it, in which a byte of the weights of step 8 is another."""
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    shard = folder / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    return folder


def test_the_run_goes_on_from_the_one_before(one_rank, run_file, reference, damaged, capsys):
    before = sorted(path.name for path in (damaged / "checkpoints").iterdir())
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(damaged)), one_rank)
    # Nothing is written, and so nothing renamed, until the run begins.
    assert sorted(path.name for path in (damaged / "checkpoints").iterdir()) == before
    pretrain.train(run)
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if "quarantined" in line]
    assert "step-00000008/rank-00000.safetensors: damaged" in line and line.endswith("step-00000008.damaged")
    assert "step-00000004 at step 4" in said
    assert tiny_run.curve(damaged) == tiny_run.curve(reference)
    assert (damaged / "checkpoints" / "step-00000008.damaged").is_dir()


def test_weights_to_start_from_are_verified_and_stay(one_rank, run_file, damaged, tmp_path):
    base = damaged / "checkpoints" / "step-00000008"
    overrides = ["--run_folder", str(tmp_path / "new"), "--model.initialize_from", str(base)]
    with pytest.raises(UserError, match=r"rank-00000.safetensors: damaged.* model.initialize_from"):
        pretrain.build(tiny_run.configure(run_file, *overrides), one_rank)
    assert base.is_dir() and not (tmp_path / "new").exists()


def test_a_folder_that_another_process_writes_to(one_rank, run_file, damaged):
    def times():
        return {path: path.stat().st_mtime_ns for path in damaged.rglob("*") if path.is_file() and path.name != ".lock"}

    files = times()
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(damaged)), one_rank)
    with run_folder_lock(damaged), pytest.raises(UserError, match="is writing to it"):
        pretrain.train(run)
    assert times() == files


def test_the_last_checkpoint_of_a_budget_that_was_raised_is_one_like_the_others(one_rank, run_file, tmp_path):
    overrides = ["--run_folder", str(tmp_path), "--checkpoint.keep_last", "1", "--checkpoint.keep_every", "8"]
    tiny_run.train(one_rank, run_file, [*overrides, "--training.train_tokens", str(6 * 8 * 32)])
    tiny_run.train(one_rank, run_file, overrides)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000016", "step-00000020"]


@pytest.mark.parametrize("upgraded", [False, True])
def test_a_run_of_the_former_format_continues_bit_for_bit(
    one_rank, run_file, reference, interrupted, tmp_path, upgraded
):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    old_format.rewrite(folder / "checkpoints" / "step-00000008")
    if upgraded:
        upgrade(folder, lambda line: None)
    run = pretrain.build(tiny_run.configure(run_file, "--run_folder", str(folder)), one_rank)
    assert run.progress.step == 8
    pretrain.train(run)
    assert tiny_run.curve(folder) == tiny_run.curve(reference)
