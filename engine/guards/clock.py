"""A clock that does not count time in which this process was stopped: by Ctrl-Z, SIGSTOP, a debugger, or a frozen
container.

Time limits of a wait for other ranks use it: all of them may have been stopped together. (A suspended laptop does not
count in any case: Linux's monotonic clock leaves it out.)
"""

from __future__ import annotations

import threading
import time

LONGEST_GAP = 5.0  # seconds: a busy machine may well leave a thread waiting for some


class SuspendAwareClock:
    """Seconds in which this process could run.

    Args:
        longest_gap: seconds. Some thread must read the clock more often; a longer time between two readings counts as
            a stop, and does not pass.
    """

    def __init__(self, longest_gap: float = LONGEST_GAP):
        self.longest_gap = longest_gap
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._stopped = 0.0

    @classmethod
    def read_every(cls, interval: float, limit: float) -> SuspendAwareClock:
        """A clock that a thread reads every ``interval`` seconds to compare times with ``limit``."""
        return cls(max(2 * interval, min(LONGEST_GAP, limit / 2)))

    def now(self) -> float:
        """Seconds since some moment."""
        with self._lock:
            now = time.monotonic()
            if now - self._last > self.longest_gap:
                self._stopped += now - self._last
            self._last = now
            return now - self._stopped
