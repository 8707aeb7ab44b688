"""Python's garbage collector, kept from stopping a rank at a moment of its own choosing."""

from __future__ import annotations

import gc


class GarbageSchedule:
    """While entered, garbage is collected every ``interval`` steps, by all ranks at the same step, and never between.

    A collection takes tens of milliseconds in a large program, and every rank waits for the slowest: at moments of
    their own, n ranks make each other wait n times. An interval of 0 leaves the collector alone. The collector's former
    state is restored on leaving.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._was_enabled = False

    def __enter__(self) -> GarbageSchedule:
        self._was_enabled = gc.isenabled()
        if self._interval:
            gc.collect()
            gc.disable()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._interval and self._was_enabled:
            gc.enable()

    def step_done(self, step: int) -> None:
        """Collect if ``step`` is one of the schedule."""
        if self._interval and step % self._interval == 0:
            gc.collect()
