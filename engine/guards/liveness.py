"""Detect dead ranks: each rank writes a heartbeat to the launcher's store, and watches those of the others.

A collective that fails or never returns does not tell which rank caused it. One thread exchanges heartbeats, and
another looks for dead ranks. The first rank that finds one makes all others end with the same error. The main thread
takes no part, because it may be stuck in a collective. Time in which this process was stopped does not count: all ranks
may have been stopped together.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch.distributed import distributed_c10d

from ..errors import UserError, report_user_error
from .clock import SuspendAwareClock
from .rendezvous import Rendezvous
from .stacks import dump_stacks

_LOST_CONTACT = re.compile(r"gloo|nccl|tcpstore|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
_SETTLING_SECONDS = 3.0
"""Ranks that fail together each report their own error. Later than this, the others report the first failure."""
_LONGEST_LINE = 500
BACKGROUND_GROUP = "apart"
"""Description of process groups for background work, in which ranks may wait for long."""
_OWN_ERROR = "ended with its own error"
"""Part of an error that needs no stacks, because that rank has printed its own traceback."""


class Liveness:
    """Watches all ranks while it is entered. Ends this process if another rank is silent, stuck or has failed.

    An exception that leaves the context is sent to the others. If a lost connection caused it, this process waits for
    the actual cause, and reports that instead.
    """

    def __init__(self, rendezvous: Rendezvous, timeout_seconds: float):
        self.rendezvous, self.timeout = rendezvous, timeout_seconds
        # Every rank reads the heartbeats of all ranks: with many ranks less often.
        self.interval = max(0.2, min(2.5, timeout_seconds / 10)) * max(1.0, rendezvous.world_size / 128)
        self.grace_seconds = 3 * self.interval
        self._clock = SuspendAwareClock.read_every(self.interval, timeout_seconds)
        self._store: Any = rendezvous.store.clone()  # type: ignore[attr-defined]  # a connection of its own
        now = self._clock.now()
        self._signs: list[dict[str, Any]] = [{} for _ in rendezvous.notes]
        self._changed = [now] * rendezvous.world_size
        self._reached, self._moved = now, now
        self._failed: float | None = None
        self._left: dict[str, str] | None = None
        self._hurry, self._told, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)]

    def __enter__(self) -> Liveness:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            # Launchers end the neighbours of a rank that has died. Some seconds are needed to say why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if error is not None and is_connection_error(error):
            self._failed = self._clock.now()
            time.sleep(3 * self.grace_seconds)  # by then this process has ended, if there is a culprit
        if error is None:
            self._leave("finished", "")
            self._stop()
            return
        text = " ".join(f"{kind.__name__ if kind else ''}: {error}".split())
        self._leave("failed", text)
        if isinstance(error, UserError):
            error.printed_elsewhere = self._main_says(text)
        # The line or traceback comes first; then, while the launcher sees this process alive, all can learn of it.
        atexit.register(self._linger)

    def _main_says(self, text: str) -> bool:
        """Wait shortly, and return whether rank 0 prints the same error as this rank has."""
        if self.rendezvous.rank == 0:
            return False
        mine = _without_rank(text)
        until = time.monotonic() + min(_SETTLING_SECONDS, self.grace_seconds)
        while time.monotonic() < until:
            left = self._signs[0].get("left")
            if left:
                return left["how"] == "failed" and _without_rank(left["text"]) == mine
            time.sleep(0.02)
        return False

    # ---------------------------------------------------------------------------------------------------------------
    # Heartbeats

    def _exchange(self) -> None:
        """Write this rank's heartbeat and read the others'. A broken link may block this thread forever."""
        keys = [f"alive/{rank}" for rank in range(self.rendezvous.world_size)]
        count = 0
        while not self._ended.is_set():
            count += not self._left  # others measure the time since the last change
            sign = {"count": count, "collectives": _collectives_begun(), "left": self._left}
            with suppress(RuntimeError):
                self._store.set(keys[self.rendezvous.rank], json.dumps(sign))
                if self._left:
                    self._told.set()
                self._read(keys)
            self._hurry.wait(self.interval)
            if self._left:
                time.sleep(min(0.1, self.interval))

    def _read(self, keys: list[str]) -> None:
        present = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        for key, value in zip(present, self._store.multi_get(present), strict=True):
            rank, sign, now = keys.index(key), json.loads(value), self._clock.now()
            if sign != self._signs[rank]:
                self._signs[rank], self._changed[rank] = sign, now
        self._reached = self._clock.now()

    def _leave(self, how: str, text: str) -> None:
        """Tell the other ranks that this one sends no more heartbeats."""
        self._left = {"how": how, "text": text[:_LONGEST_LINE]}
        self._hurry.set()
        self._told.wait(self.grace_seconds)

    def _linger(self) -> None:
        """Wait until all living ranks have left too: the store may end with this process and its launcher."""
        until = time.monotonic() + _SETTLING_SECONDS + self.grace_seconds
        while time.monotonic() < until and any(not sign.get("left") for sign in self._others_alive()):
            time.sleep(0.05)
        self._stop()

    def _stop(self) -> None:
        """End the threads: the interpreter must not exit while they use the store."""
        self._ended.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(self.grace_seconds)

    def _others_alive(self) -> list[dict[str, Any]]:
        silent = self._silent(self.grace_seconds)
        return [self._signs[rank] for rank in self._others() if rank not in silent]

    def _others(self) -> list[int]:
        return [rank for rank in range(self.rendezvous.world_size) if rank != self.rendezvous.rank]

    # ---------------------------------------------------------------------------------------------------------------
    # Detection

    def _judge(self) -> None:
        begun: dict[str, int] = {}
        while not self._ended.wait(self.interval / 2):
            if begun != (begun := _collectives_begun()):
                self._moved = self._clock.now()
            if verdict := self._verdict():
                if _OWN_ERROR not in verdict:
                    dump_stacks()
                report_user_error(UserError(verdict))
                self._leave("verdict", verdict)
                self._linger()
                sys.stdout.flush()
                os._exit(1)

    def _verdict(self) -> str | None:
        """Return why this run cannot continue, or None."""
        if self._left:
            return None
        now, name = self._clock.now(), self.rendezvous.name
        for rank in self._others():
            left = self._signs[rank].get("left") or {"how": "", "text": ""}
            if left["how"] == "verdict":
                return left["text"]
            if left["how"] == "failed" and now - self._changed[rank] > _SETTLING_SECONDS:
                return f"{name([rank])} {_OWN_ERROR}: {left['text']}"
        patience = self.timeout if self._failed is None else self.grace_seconds
        # While collectives complete, no rank is missing, even if heartbeats are.
        stuck = self._failed is not None or now - self._moved > self.grace_seconds
        if stuck and (silent := self._silent(patience)):
            seconds = now - max(self._changed[rank] for rank in silent)
            which = f"{name(silent)} sent no heartbeat for {seconds:.0f} s"
            if now - self._reached > patience:
                which += ", nor did the launcher's store on the same host"
            if len(silent) == len(self._others()) and len({note["host"] for note in self.rendezvous.notes}) > 1:
                which += (
                    f", or the network of this host ({self.rendezvous.notes[self.rendezvous.rank]['host']}) is down"
                )
            return f"{which}; see that node's output and link. The same command resumes from the newest checkpoint"
        return self._behind(now)

    def _silent(self, patience: float) -> list[int]:
        """Return the ranks without a heartbeat for ``patience`` seconds; the store's ranks if it cannot be read."""
        now = self._clock.now()
        known = [
            rank
            for rank in self._others()
            if not self._signs[rank].get("left") and self._reached - self._changed[rank] > self.grace_seconds
        ]
        known = [rank for rank in known if now - self._changed[rank] > patience]
        if known or now - self._reached <= patience:
            return known
        return [rank for rank in self._others() if self.rendezvous.notes[rank]["holds_store"]] or self._others()

    def _behind(self, now: float) -> str | None:
        """Return an error about living ranks that do not join a collective in which others wait, or None."""
        waited = now - self._moved
        if waited < self.timeout and (self._failed is None or now - self._failed < 2 * self.grace_seconds):
            return None
        counts = {rank: sign["collectives"] for rank, sign in enumerate(self._signs) if "collectives" in sign}
        most = {group: max(c.get(group, 0) for c in counts.values()) for c in counts.values() for group in c}
        least = {group: min(c[group] for c in counts.values() if group in c) for c in counts.values() for group in c}
        late = [
            rank
            for rank, c in counts.items()
            if any(c[group] < most[group] for group in c) and not any(c[group] > least[group] for group in c)
        ]
        if not late or self.rendezvous.rank in late or self._silent(self.grace_seconds):
            return None  # silent ranks are reported as silent, after their time limit
        return (
            f"{self.rendezvous.name(late)} has not reached a collective operation in which the others have waited for "
            f"{waited:.0f} s: it hangs, or parallel.timeout_seconds is too small"
        )


def is_connection_error(error: BaseException) -> bool:
    """Return whether ``error`` was caused by the end of another rank."""
    return not isinstance(error, UserError) and _LOST_CONTACT.search(str(error)) is not None


def _without_rank(text: str) -> str:
    """Return ``text`` without the leading rank number, which only the other ranks add."""
    return re.sub(r"^\w+: (rank \d+: )?", "", text)[: _LONGEST_LINE // 2]


def _collectives_begun() -> dict[str, int]:
    """Return the number of collectives that this rank has begun in each group.

    Groups of the same ranks are numbered in the order of their creation.
    """
    begun: dict[str, int] = {}
    for group in list(distributed_c10d._world.pg_map):
        ranks = distributed_c10d._world.pg_group_ranks.get(group)
        # None: the main thread is creating or destroying the group.
        if ranks is None or group.group_desc == BACKGROUND_GROUP:
            continue
        name = hashlib.sha256(json.dumps(list(ranks)).encode()).hexdigest()[:8]
        for device in group._device_types:
            with suppress(RuntimeError):  # not begun yet
                key = next(k for n in range(1000) if (k := f"{name}.{device.type}.{n}") not in begun)
                backend: Any = group._get_backend(torch.device(device.type))
                begun[key] = backend._get_sequence_number_for_group()
    return begun
