"""Ranks for the tests of plans."""

from __future__ import annotations

import pytest
from rank_cluster import RankCluster


@pytest.fixture(scope="module")
def fresh_ranks(tmp_path_factory):
    """Two ranks whose memory no other test has used."""
    cluster = RankCluster(2, tmp_path_factory.mktemp("fresh_ranks"))
    yield cluster
    cluster.close()
