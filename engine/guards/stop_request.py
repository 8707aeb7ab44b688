"""Handle requests for a graceful stop by signal or time limit, on all ranks at the same step.

SIGTERM and SIGINT (Ctrl-C) request a stop. SIGUSR1, SIGUSR2 (LSF, Grid Engine), SIGHUP (a closed terminal), SIGXCPU (a
limit of CPU time) and SIGPWR (power failure or container shutdown) announce the end of the job. All of them have the
same effect: save and end. Launchers and terminals send several copies, so signals within :data:`GRACE_SECONDS` of the
first are ignored. A later SIGTERM or SIGINT ends the process immediately. A later announcement does not: the kernel
repeats SIGXCPU every second while the checkpoint is written. An incomplete checkpoint has no name yet, so the next run
does not see it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..parallel.process_group import Ranks

REQUESTS = (signal.SIGTERM, signal.SIGINT)
NOTICES = tuple(
    signal.Signals[name]
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU", "SIGPWR")
    if name in signal.Signals.__members__  # SIGPWR exists on Linux only
)
SIGNALS = REQUESTS + NOTICES
GRACE_SECONDS = 2.0
"""Signals within this time after the first one are copies of it."""


class StoppedBeforeTraining(SystemExit):
    """A stop was requested before the first step: exit status 0, since there is nothing to save."""

    def __init__(self) -> None:
        super().__init__(0)
        if os.environ.get("RANK", "0") == "0":
            print("stopped as requested before the first step: nothing to save", flush=True)


class StopRequest:
    """Records signals while it is entered, instead of ending the process. It may be entered again inside.

    Args:
        ranks: all ranks, which stop together. None until :meth:`defer` is called; before that, the first signal ends
            the process immediately, because no other rank depends on it yet.
    """

    def __init__(self, ranks: Ranks | None = None):
        self._ranks = ranks
        self._holding = ranks is not None
        self._began = time.monotonic()
        self._deadline: float | None = None
        self._first: float | None = None
        self._requested = False
        self._entered = 0
        self._former: dict[signal.Signals, Any] = {}
        self._former_descriptor = -1

    def __enter__(self) -> StopRequest:
        self._entered += 1
        if self._entered == 1:
            # Python calls signal handlers in the main thread, which may wait in a collective. A thread that reads the
            # signal numbers from a socket receives them at any time.
            self._numbers, self._hear = socket.socketpair()
            self._hear.setblocking(False)
            self._former_descriptor = signal.set_wakeup_fd(self._hear.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # under nohup the run outlives its terminal
                self._former[number] = signal.signal(number, self._remember)
            self._thread = threading.Thread(target=self._listen, name="stop-request", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered:
            return
        for number, handler in self._former.items():
            if signal.getsignal(number) == self._remember:  # keep a handler that was set inside
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_descriptor)
        self._hear.close()
        self._thread.join()
        self._numbers.close()

    def defer(self, ranks: Ranks | None = None) -> None:
        """Only record signals from now on; ``ranks``, once known, stop together."""
        self._ranks, self._holding = ranks, True

    def stop_after(self, minutes: float | None) -> None:
        """Also request a stop ``minutes`` after the creation of this object."""
        self._deadline = None if minutes is None else self._began + 60 * minutes

    def request(self) -> None:
        """Request a stop of all ranks after the current step. Signals keep their meaning."""
        self._requested = True

    def agreed(self) -> bool:
        """Return whether any rank was requested to stop; the same on every rank. All ranks must call this."""
        assert self._ranks is not None
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._ranks.all_reduce(late or self._requested or self._first is not None) > 0

    def exit_if_agreed(self) -> None:
        """Raise StoppedBeforeTraining on every rank if a stop was requested. All ranks must call this."""
        if self.agreed():
            raise StoppedBeforeTraining

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
        if not self._holding:
            raise StoppedBeforeTraining

    def _listen(self) -> None:
        while received := self._numbers.recv(16):
            now = time.monotonic()
            for number in received:
                if number not in SIGNALS or signal.getsignal(number) != self._remember:
                    continue
                if self._first is None:
                    self._first = now
                elif number in REQUESTS and now - self._first > GRACE_SECONDS:
                    with contextlib.suppress(OSError):
                        name = signal.Signals(number).name
                        os.write(2, f"{name} received again: ends at once; complete checkpoints are kept\n".encode())
                    os._exit(128 + number)
