"""Time in which a process was stopped does not count: neither for one that waits for itself, nor for others."""

from __future__ import annotations

from retemper.engine.guards import clock as clock_module
from retemper.engine.guards.clock import SuspendAwareClock


def test_a_long_gap_between_two_readings_does_not_pass(monkeypatch):
    now = 100.0
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now)
    clock = SuspendAwareClock(longest_gap=5.0)
    began, passed = clock.now(), []
    for gap in (4.0, 5.0, 3600.0, 1.0, 5.1, 2.0):
        now += gap
        passed.append(clock.now() - began)
    assert passed == [4.0, 9.0, 9.0, 10.0, 10.0, 12.0]
