"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import pytest
import saved_runs


@pytest.fixture(scope="session")
def saved(one_rank, tmp_path_factory):
    """Run folder with checkpoints of the steps 4, 8 and 12. Copy it before damaging it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    saved_runs.save(one_rank, folder, 4, 8, 12)
    return folder


@pytest.fixture
def run_folder(saved, tmp_path):
    """A copy of :func:`saved`."""
    return saved_runs.copy_of(saved, tmp_path / "run")
