"""Long work of some ranks: its result, its failure and its end, on all ranks."""

from __future__ import annotations

import time

import pytest

from retemper.engine.errors import UserError
from retemper.engine.guards import background
from retemper.engine.guards.background import run_in_background


def work_on_rank_1(ranks, action):
    """What rank 1 does alone, while no rank waits in one long collective; what every rank gets or raises."""
    background._SECONDS = 0.01
    calls, aborted = [], []

    def work():
        if action == "fails":
            raise UserError("no such repository")
        for _ in range(20 if action == "succeeds" else 10_000):
            if aborted:
                return "aborted"
            time.sleep(0.01)
        return "done"

    def should_abort():
        calls.append(None)
        return action == "is aborted" and len(calls) == 3

    try:
        result = run_in_background(ranks, work if ranks.rank == 1 else None, should_abort, lambda: aborted.append(None))
    except UserError as error:
        result = str(error)
    return result, bool(aborted)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("succeeds", [(None, False), ("done", False)]),
        ("is aborted", [(None, True), ("aborted", True)]),
    ],
)
def test_the_result_is_on_the_rank_that_worked(two_ranks, action, expected):
    assert two_ranks.run(work_on_rank_1, action) == expected


def test_a_failure_is_raised_on_all_ranks(two_ranks):
    results = two_ranks.run(work_on_rank_1, "fails")
    assert [result for result, _ in results] == ["rank 1: no such repository", "no such repository"]
