"""Fixtures of the tests of ranks that watch each other."""

from __future__ import annotations

import pytest
from forked import fork_server
from launched_ranks import Launched


@pytest.fixture(scope="module")
def server():
    """Has imported what ``RANK`` does: three seconds of a core less for each rank."""
    names = ("guards.rank_consistency", "parallel.process_group", "guards.stop_request")
    with fork_server(*(f"retemper.engine.{name}" for name in names)) as context:
        yield context


@pytest.fixture
def launch(server, tmp_path):
    """Starts a rank for each of the programs that are given."""
    launched: list[Launched] = []

    def start(*programs: str) -> Launched:
        launched.append(Launched(server, tmp_path, list(programs)))
        return launched[-1]

    yield start
    for run in launched:
        for program in [*run.ranks, run.store]:
            program.close()
