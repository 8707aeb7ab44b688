"""What the launch tests share: a tiny run, and its undisturbed curve."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import yaml
from launch_runs import NUM_STEPS, PRETRAIN


@pytest.fixture(scope="session")
def run_file(tmp_path_factory) -> Path:
    """The YAML file of the tiny run with ``NUM_STEPS`` steps; give each run its own ``--run_folder``.

    Slow enough learning that the last digits of a sum, whose order depends on the ranks, do not grow with the steps.
    """
    path = tiny_run.write_config(tmp_path_factory.mktemp("tiny"))
    config = yaml.safe_load(path.read_text())
    config["training"]["train_tokens"] = NUM_STEPS * 8 * 32
    config["training"] |= {"eval_interval": 25, "micro_batch_size": 2}
    config["checkpoint"]["save_interval"] = 10
    config["optimizer"] |= {"learning_rate": 1e-3, "min_learning_rate": 1e-4}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def undisturbed(run_file, tmp_path_factory) -> list[tuple]:
    """The curve of the run on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, PRETRAIN, "--config", str(run_file), "--run_folder", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return tiny_run.curve(folder)
