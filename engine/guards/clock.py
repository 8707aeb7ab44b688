"""Measure time without the time in which this process was stopped (Ctrl-Z, SIGSTOP, a debugger, a frozen container).

Time limits for other ranks use this clock, because all ranks may have been stopped together. Time in which a laptop
sleeps never counts: Linux's monotonic clock excludes it.
"""

from __future__ import annotations

import threading
import time

LONGEST_GAP = 5.0  # seconds; on a busy machine a thread may wait for some


class SuspendAwareClock:
    """Counts the seconds in which this process could run.

    Args:
        longest_gap: seconds. Some thread must read the clock more often. A longer time between two readings means that
            the process was stopped, and does not count.
    """

    def __init__(self, longest_gap: float = LONGEST_GAP):
        self.longest_gap = longest_gap
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._stopped = 0.0

    @classmethod
    def read_every(cls, interval: float, limit: float) -> SuspendAwareClock:
        """Return a clock for a thread that reads it every ``interval`` seconds and compares times with ``limit``."""
        return cls(max(2 * interval, min(LONGEST_GAP, limit / 2)))

    def now(self) -> float:
        """Return the seconds since an arbitrary moment."""
        with self._lock:
            now = time.monotonic()
            if now - self._last > self.longest_gap:
                self._stopped += now - self._last
            self._last = now
            return now - self._stopped
