"""Ranks of tests that fail or hang tell so, and leave the tests after them alone."""

from __future__ import annotations

import os
import time

import pytest
import rank_cluster
from rank_cluster import RankCluster

from retemper.engine.parallel.process_group import Ranks


def number(ranks: Ranks) -> int:
    return ranks.rank


def fail_or_wait(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("the cause")
    time.sleep(1000)


def end(ranks: Ranks) -> None:
    if ranks.rank == 0:
        os._exit(3)


def wait(ranks: Ranks) -> None:
    time.sleep(1000)


@pytest.mark.slow  # starts ranks three times
def test_ranks_that_fail_or_hang_tell_where(tmp_path, monkeypatch):
    cluster = RankCluster(2, tmp_path, time_limit=60)
    try:
        assert cluster.run(number) == [0, 1]
        monkeypatch.setattr(cluster, "_time_limit", 0.5)
        with pytest.raises(AssertionError, match=r"(?s)rank 0 has not answered.*in wait.*rank 1 has not"):
            cluster.run(wait)
        monkeypatch.undo()
        monkeypatch.setattr(rank_cluster, "_PATIENCE", 0.5)
        with pytest.raises(AssertionError, match=r"(?s)rank 1:.*the cause.*rank 0 has not answered.*in fail_or_wait"):
            cluster.run(fail_or_wait)
        with pytest.raises(AssertionError, match="rank 0 has not answered"):
            cluster.run(end)
        assert cluster.run(number) == [0, 1]
    finally:
        cluster.close()
