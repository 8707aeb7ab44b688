"""Rendezvous through the launcher's key-value store, so that a missing rank is reported and does not hang a collective.

An elastic launcher keeps one store across restarts, with the keys of former attempts, and its nodes may count restarts
differently. :func:`join` gives every attempt its own prefix.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import UserError
from ..parallel.launcher import read_launcher
from .clock import SuspendAwareClock

_PAUSE = 0.05  # seconds between two polls, for up to 32 ranks
_PARTING_SECONDS = 5


class MissingRanks(UserError):
    """Ranks did not connect in time."""

    hosts: Sequence[str] = ()
    """Hosts of the ranks that did."""


@dataclass(frozen=True)
class Rendezvous:
    """All ranks of this attempt, and their own part of the store."""

    store: dist.Store
    rank: int
    notes: list[dict[str, Any]]
    """Notes from each rank; ``host`` and ``holds_store`` are always present."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.notes)

    def name(self, ranks: Sequence[int]) -> str:
        """Return ``ranks`` with their hosts, for messages."""
        shown = ", ".join(f"{rank} ({self.notes[rank]['host']})" for rank in ranks[:8])
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"

    def leave(self) -> None:
        """Wait some seconds until all ranks know why they end: the store may end with the first process."""
        with suppress(RuntimeError):
            self.store.set(f"parting/{self.rank}", "")
            self.store.wait([f"parting/{rank}" for rank in range(self.world_size)], timedelta(seconds=_PARTING_SECONDS))


def join(note: dict[str, Any], timeout_seconds: float) -> Rendezvous:
    """Wait for all ranks of the launcher's environment variables, and exchange notes.

    Args:
        note: sent to the other ranks; plain JSON.
        timeout_seconds: how long to wait for the last rank.

    Raises:
        UserError: the store cannot be reached, or ranks are missing, which are named (MissingRanks).
    """
    launcher = read_launcher()
    port = os.environ.get("MASTER_PORT")
    where = f"{os.environ.get('MASTER_ADDR')}:{port}"
    limit = timedelta(seconds=timeout_seconds)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        return _join(store, rank, world_size, note, timeout_seconds, launcher.node)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT {port} is in use on this machine: set it to a free one (torchrun: --standalone on one "
                "machine, else --master-port)"
            ) from None
        raise UserError(
            f"the launcher's store at {where} did not answer within {timeout_seconds:g} s ({str(error)[:100]}); "
            "check that its host runs and can be reached from here"
        ) from None


def _join(
    store: dist.Store,
    rank: int,
    world_size: int,
    note: dict[str, Any],
    timeout_seconds: float,
    node: int | None = None,
) -> Rendezvous:
    # Each rank writes a hello with a unique name. Rank 0 writes a roll of all names; a rank that finds its own name in
    # it confirms this roll. A roll that all ranks have confirmed has no rank of a former attempt.
    mine = uuid.uuid4().hex[:12]
    here = {
        "host": socket.gethostname(),
        # torchrun's agent on the first node holds the store, else rank 0 does.
        "holds_store": (rank if node is None else node) == 0,
    }
    hellos = [f"hello/{other}" for other in range(world_size)]
    store.set(hellos[rank], json.dumps({"name": mine, **here, **note}))
    clock = SuspendAwareClock()
    deadline = clock.now() + timeout_seconds
    pause = _PAUSE * max(1, world_size // 32)
    while clock.now() < deadline:
        if rank == 0 and store.check(hellos):
            names = [json.loads(value)["name"] for value in store.multi_get(hellos)]
            store.set("roll", json.dumps(names))
        if store.check(["roll"]):
            roll = store.get("roll").decode()
            attempt = hashlib.sha256(roll.encode()).hexdigest()[:16]
            called = mine in json.loads(roll)
            if called:
                store.set(f"{attempt}/here/{rank}", "")
            if rank == 0 and store.check([f"{attempt}/here/{other}" for other in range(world_size)]):
                store.set(f"{attempt}/complete", "")
            if called and store.check([f"{attempt}/complete"]):
                notes = [json.loads(value) for value in store.multi_get(hellos)]
                return Rendezvous(dist.PrefixStore(attempt, store), rank, notes)
        time.sleep(pause)
    raise _missing_ranks(store, world_size, timeout_seconds)


def _missing_ranks(store: dist.Store, world_size: int, timeout_seconds: float) -> MissingRanks:
    roll = store.get("roll").decode() if store.check(["roll"]) else "[]"
    attempt = hashlib.sha256(roll.encode()).hexdigest()[:16]
    came = [r for r in range(world_size) if store.check([f"{attempt}/here/{r}" if roll != "[]" else f"hello/{r}"])]
    missing = sorted(set(range(world_size)) - set(came))
    listed = ", ".join(map(str, missing[:16])) + (" ..." if len(missing) > 16 else "")
    hosts = sorted({json.loads(store.get(f"hello/{rank}"))["host"] for rank in came})
    error = MissingRanks(
        f"{len(missing)} of {world_size} ranks did not connect within {timeout_seconds:g} s: {listed or 'unknown'} "
        f"(connected: those on {', '.join(hosts[:8])}); see the output of the nodes that are missing"
    )
    error.hosts = hosts
    return error
