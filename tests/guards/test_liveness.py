"""Ranks watch each other, and say why they end."""

from __future__ import annotations

import os
import re
import signal
from types import SimpleNamespace

import pytest
from forked import LIMIT_SECONDS

from retemper.engine.guards import liveness

TIMEOUT_SECONDS = 4
WORK = """
def main():
    with process_group("cpu", {timeout}) as ranks, StopRequest(ranks):
        # Where the last rank is missing, the second waits for it, and the first for the second.
        pair = dist.new_group([1, 2])
        last = ranks.world_size - 1
        for step in range({steps}):
            if step == 50 and ranks.rank == last:
                print("now", flush=True)
                {event}
            if ranks.rank > 0:
                dist.all_reduce(torch.ones(1), group=pair)
            ranks.all_reduce(1)
            time.sleep(0.005)
        print("finished", flush=True)

run_command(main)
"""


def working(event: str, steps: int = 100_000, timeout: int = TIMEOUT_SECONDS) -> list[str]:
    return [WORK.format(event=event, steps=steps, timeout=timeout)] * 3


def test_an_undisturbed_run_ends_well(launch):
    run = launch(*working("pass", steps=60, timeout=LIMIT_SECONDS))
    assert run.wait() == [0, 0, 0], [run.say(rank) for rank in range(3)]
    assert [run.errors(rank) for rank in range(3)] == [[], [], []]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"rank 2 \(host2\) sent no heartbeat for (\d+) s; see that node"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 2 \(host2\) sent no heartbeat for (\d+) s; see that node"),
        (
            "time.sleep(1000)",
            r"rank 2 \(host2\) has not reached a collective operation in which the others have waited",
        ),
        pytest.param(
            "raise KeyError('no such thing')",
            r"rank 2 \(host2\) ended with its own error: KeyError: 'no such thing'",
            marks=pytest.mark.slow,
        ),
        (
            "raise UserError('a bad file')",
            r"rank 2 \(host2\) ended with its own error: UserError: a bad file",
        ),
    ],
    ids=["killed", "stopped", "hanging", "failed", "refused"],
)
def test_the_rank_that_is_the_cause_is_named_by_all_others(launch, event, reason):
    run = launch(*working(event))
    codes = run.wait([0, 1])
    assert codes == [1, 1]
    for rank in (0, 1):
        [line] = run.errors(rank)
        found = re.match(reason, line)
        assert found, line
        if "SIGSTOP" in event:
            assert int(found[1]) >= TIMEOUT_SECONDS
        if "SIGKILL" in event:  # the failed collective has shortened the wait
            assert int(found[1]) >= 1
        assert "rank 0" not in line and "rank 1" not in line
        assert ("stacks of all threads" in run.say(rank)) == ("raise" not in event)
    if "sleep" in event:  # the one at fault says where it is
        assert run.wait([2]) == [1]
        stacks = run.say(2).partition("[rank 2] stacks of all threads")[2]
        assert re.search(r'^  File "<string>", line \d+ in main$', stacks, re.MULTILINE)
    if "raise" in event:
        assert run.wait([2]) == [1]
        assert "no such thing" in run.say(2) or run.errors(2) == ["a bad file"]


def test_an_error_that_all_share_is_printed_once(launch):
    together = """
            try:
                ranks.raise_on_all('bad' if step == 20 and ranks.rank == 1 else None)
            except UserError:
                time.sleep(ranks.rank / 2)  # not all are as quick to say so
                raise
"""
    run = launch(
        *[program.replace("ranks.all_reduce(1)", together) for program in working("pass", timeout=LIMIT_SECONDS)]
    )
    assert run.wait() == [1, 1, 1]
    assert [run.errors(rank) for rank in range(3)] == [["rank 1: bad"], [], []]


@pytest.mark.slow
def test_a_node_that_held_the_store_is_named_when_it_is_gone(launch):
    run = launch(*working("pass"))
    run.until_said(2, "now")
    for process in (run.store.process, run.ranks[0].process):
        os.kill(process.pid, signal.SIGSTOP)
    assert run.wait([1, 2]) == [1, 1]
    for rank in (1, 2):
        [line] = run.errors(rank)
        expected = r"rank 0 \(host0\) sent no heartbeat for (\d+) s, nor did the launcher's store on the same host;"
        found = re.match(expected, line)
        assert found and int(found[1]) >= TIMEOUT_SECONDS, line


@pytest.mark.slow
def test_a_run_goes_on_without_the_store(launch):
    run = launch(*working("pass", steps=50 + TIMEOUT_SECONDS * 200))
    run.until_said(2, "now")
    os.kill(run.store.process.pid, signal.SIGSTOP)
    run.until_said(0, "finished")
    assert all(run.errors(rank) == [] for rank in range(3))


def test_a_group_that_is_being_made_or_taken_down_is_passed_over(monkeypatch):
    """PyTorch's tables of groups are filled and emptied one after the other, while the watch reads them."""
    world = SimpleNamespace(pg_map={object(): None}, pg_group_ranks={})
    monkeypatch.setattr(liveness.distributed_c10d, "_world", world)
    assert liveness._collectives_begun() == {}
