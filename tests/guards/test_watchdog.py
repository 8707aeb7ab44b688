"""A step that hangs ends the process; one that was stopped meanwhile does not count as hanging."""

from __future__ import annotations

import os
import signal
import time

from retemper.engine.guards.watchdog import Watchdog
from retemper.engine.parallel.process_group import Ranks


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
