"""Ranks find each other in the launcher's store, and name those that do not come."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from forked import LIMIT_SECONDS
from launched_ranks import agreeing

from retemper.engine.guards.rendezvous import Rendezvous, _join


def test_a_rank_that_does_not_come_is_named(launch):
    soon = agreeing().replace(f"timeout_seconds = {LIMIT_SECONDS}", "timeout_seconds = 6")
    run = launch(soon, soon, "sys.exit('no such file')")
    assert run.wait() == [1, 1, 1]
    for rank in range(2):
        said = run.say(rank)
        assert said.startswith(f"[rank {rank}] error: 1 of 3 ranks did not connect within 6 s: 2 (connected: those on")


@pytest.mark.parametrize("stale", [["roll"], ["hello/1", "roll"], ["hello/0", "hello/1", "roll"]], ids=str)
def test_what_a_former_attempt_left_in_the_store_is_not_taken_for_the_new_one(stale):
    store = dist.HashStore()
    former = _meet_all(store)
    for key in {"hello/0", "hello/1", "roll"} - set(stale):
        store.delete_key(key)
    again = _meet_all(store)
    assert [rendezvous.notes[1]["attempt"] for rendezvous in again] == [again[0].notes[1]["attempt"]] * 2
    assert again[0].notes[1]["attempt"] != former[0].notes[1]["attempt"]
    former[0].store.set("key", "old")
    assert not again[1].store.check(["key"])
    again[0].store.set("key", "new")
    assert again[1].store.get("key") == b"new"


def _meet_all(store: dist.Store) -> list[Rendezvous]:
    """Two ranks that join, the first one some time after the second."""
    with ThreadPoolExecutor(2) as pool:
        note = {"attempt": time.monotonic()}
        second = pool.submit(_join, store, 1, 2, note, LIMIT_SECONDS)
        time.sleep(0.2)
        return [pool.submit(_join, store, 0, 2, note, LIMIT_SECONDS).result(), second.result()]
