"""Where every thread of this process stands, for those who must find out why it hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

_dumped = threading.Lock()


def dump_stacks() -> None:
    """Write the Python stack of every thread to stderr; only the first call of a process does."""
    if _dumped.acquire(blocking=False):
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"[rank {rank}] where each thread stands (most recent call first):\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)
