"""End a process that hangs with status 1, after writing the stack of each thread to stderr."""

from __future__ import annotations

import os
import sys
import threading

from ..errors import UserError, report_user_error
from ..parallel.process_group import Ranks
from .clock import SuspendAwareClock
from .stacks import dump_stacks


class Watchdog:
    """Ends the process, with its stacks and status 1, when a step comes no further for too long.

    Beats are the phases of a step: data, each micro-batch's passes, the update. Between steps (evaluations and
    checkpoints, which may take long) it sleeps. Where there are several ranks,
    :class:`~retemper.engine.guards.liveness.Liveness` is to speak first: it knows whose fault it is.

    Args:
        seconds: between two beats at most; where there are several ranks, a quarter more.
        ranks: this one among the others.
    """

    def __init__(self, seconds: float, ranks: Ranks):
        self.seconds = seconds if ranks.world_size == 1 else 1.25 * seconds + 5
        self._interval = min(1.0, self.seconds / 10)
        self._clock = SuspendAwareClock.read_every(self._interval, self.seconds)
        self._beat: tuple[float, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, what: str) -> None:
        """Something begins: ``what``, for the message."""
        self._beat = self._clock.now(), what

    def pause(self) -> None:
        """Until the next beat anything may take as long as it likes."""
        self._beat = None

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            beat = self._beat
            waited = self._clock.now() - beat[0] if beat is not None else 0.0  # read in any case
            if beat is not None and waited > self.seconds:
                self._end(beat[1], waited)

    def _end(self, what: str, waited: float) -> None:
        dump_stacks()
        report_user_error(
            UserError(
                f"{what}: no progress for {waited:.0f} s, see where each thread stands above: it hangs, or needs a "
                "larger parallel.timeout_seconds. The same command resumes from the newest checkpoint"
            )
        )
        sys.stdout.flush()
        os._exit(1)
