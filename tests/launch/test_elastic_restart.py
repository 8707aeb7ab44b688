"""torchrun --max-restarts: a rank dies, all start again, and the run goes on from its newest checkpoint by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from launch_runs import ROOT, assert_same_curve, has_step


def _ranks(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_curve_is_undisturbed(run_file, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = [ROOT / "launch" / "one_node.sh", "--config", run_file, "--run_folder", folder]
    command += ["--parallel.timeout_seconds", "10"]
    settings = {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "1", "PYTHON": sys.executable}
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not has_step(folder, 15):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    former = _ranks(process.pid)
    os.kill(former[1], signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "resumed from" in output
    assert output.count("error: rank 1 (") == 1  # what rank 0 said of it
    assert_same_curve(tiny_run.curve(folder), undisturbed)
