"""Real launches: torchrun, killed and asked to stop, and errors that every rank reports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

PRETRAIN = str(Path(__file__).parents[2] / "engine" / "pretrain.py")


def _launch(run_file, *overrides, ranks=2):
    command = [sys.executable, PRETRAIN, "--config", str(run_file), *overrides]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_step(process, run_folder, step):
    """Until the run has recorded ``step``."""
    metrics = run_folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def _pids_of_ranks(launcher):
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.mark.slow
def test_terminated_then_killed_then_resumed_is_the_undisturbed_run(two_ranks, run_file, tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    # Long enough that the run cannot end between its being seen at a step and the signal.
    steps = ["--training.train_tokens", str(40 * 8 * 32)]
    two_ranks.run(tiny_run.train, run_file, [*steps, "--run_folder", str(undisturbed)])

    process = _launch(run_file, *steps, "--run_folder", str(folder))
    _wait_for_step(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert "as requested; resume: auto continues" in output
    stopped = int(re.search(r"stopped at step (\d+)", output)[1])
    assert output.count(f"step-{stopped:08d}") == 1
    assert (folder / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").exists()

    process = _launch(run_file, *steps, "--run_folder", str(folder))
    _wait_for_step(process, folder, stopped + 2)
    os.kill(_pids_of_ranks(process)[1], signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode != 0
    assert "resumed from" in output
    assert not (folder / "checkpoints" / "step-00000040").exists()

    two_ranks.run(tiny_run.train, run_file, [*steps, "--run_folder", str(folder)])
    assert tiny_run.curve(folder) == tiny_run.curve(undisturbed)
    expected = tiny_run.tensors_of(undisturbed / "checkpoints" / "step-00000040")
    actual = tiny_run.tensors_of(folder / "checkpoints" / "step-00000040")
    assert all(actual[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_an_error_comes_in_one_line_from_one_rank_before_anything_is_written(run_file, tmp_path):
    folder = tmp_path / "run"
    alone = _launch(run_file, "--run_folder", str(folder), "--training.global_batch_size", "9", ranks=1)
    process = _launch(run_file, "--run_folder", str(folder), "--parallel.replicate", "3")
    output = alone.communicate()[0]
    assert alone.returncode == 1
    assert output.strip() == (
        "error: training.global_batch_size 9 is not a multiple of micro_batch_size 4 x data-parallel ranks 1 = 4; "
        "use 8 or 12"
    )
    output = process.communicate()[0]
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if "error: parallel.replicate 3 does not divide" in line]
    assert [line[:8] for line in errors] == ["[rank 0]"]
    assert "traceback : parallel.replicate 3 does not divide" in output  # in torchrun's report
    assert not folder.exists()
