"""End a hanging process with status 1, after writing the stacks of all threads to stderr."""

from __future__ import annotations

import os
import sys
import threading

from ..errors import UserError, report_user_error
from ..parallel.process_group import Ranks
from .clock import SuspendAwareClock
from .stacks import dump_stacks


class Watchdog:
    """Ends the process if a step makes no progress for too long.

    A beat is the start of a phase of a step: data, forward and backward of a micro-batch, the update. The watchdog
    pauses between steps, because evaluations and checkpoints may take long. With several ranks,
    :class:`~retemper.engine.guards.liveness.Liveness` reports first, because it knows which rank is the cause.

    Args:
        seconds: maximum time between two beats; a quarter more with several ranks.
        ranks: all ranks.
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
        """Note that a phase begins: ``what``, for the message."""
        self._beat = self._clock.now(), what

    def pause(self) -> None:
        """Disable the time limit until the next beat."""
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
                f"{what}: no progress for {waited:.0f} s, see the stacks of all threads above: it hangs, or needs a "
                "larger parallel.timeout_seconds. The same command resumes from the newest checkpoint"
            )
        )
        sys.stdout.flush()
        os._exit(1)
