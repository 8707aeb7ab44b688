"""Print the stacks of all threads, to find out why a process hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

_dumped = threading.Lock()


def dump_stacks() -> None:
    """Write the Python stack of every thread to stderr. Only the first call in a process does."""
    if _dumped.acquire(blocking=False):
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"[rank {rank}] stacks of all threads (most recent call first):\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)
