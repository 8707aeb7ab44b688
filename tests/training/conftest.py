"""Fixtures of the training tests."""

from __future__ import annotations

import pytest
import tiny_run


@pytest.fixture(scope="session")
def run_file(tmp_path_factory):
    """The tiny run's YAML file; give each run its own ``--run_folder``."""
    return tiny_run.write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reference(one_rank, run_file, tmp_path_factory):
    """Run folder of the undisturbed run on one rank."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder)])
    return folder
