"""Time in which a process was stopped does not count: neither for one that waits for itself, nor for others."""

from __future__ import annotations

import os
import signal
import time

from retemper.engine.guards import clock as clock_module
from retemper.engine.guards.clock import SuspendAwareClock
from retemper.engine.guards.watchdog import Watchdog
from retemper.engine.parallel.process_group import Ranks


def test_a_long_gap_between_two_readings_does_not_pass(monkeypatch):
    now = 100.0
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now)
    clock = SuspendAwareClock(longest_gap=5.0)
    began, passed = clock.now(), []
    for gap in (4.0, 5.0, 3600.0, 1.0, 5.1, 2.0):
        now += gap
        passed.append(clock.now() - began)
    assert passed == [4.0, 9.0, 9.0, 10.0, 10.0, 12.0]


def test_the_watchdog_outlives_a_stop():
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with Watchdog(1.0, Ranks(0, 1, None)) as watchdog:
            watchdog.beat("step 1, forward")
            for _ in range(8):
                time.sleep(0.1)
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
