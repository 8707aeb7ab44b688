"""Pass events to an observer on a thread of its own, so that a slow network never delays a training step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...schedule import Progress
from ..guarded import Guarded
from ..observer import Observer, RunDescription, Sample, StepRecord
from ..waiting import Say

_MOST_WAITING = 10_000
"""Maximum number of events that wait for the tracker."""
_Event = tuple[str, tuple[Any, ...]]


class Background(Observer):
    """Passes events to ``observer`` in order, on a thread. No method waits, except :meth:`wait`.

    Args:
        name: of the observer, for people.
        observer: of the tracker.
        say: prints a line for people.
        most_waiting: number of waiting events after which the observer receives no more.
    """

    def __init__(self, name: str, observer: Guarded, say: Say, most_waiting: int = _MOST_WAITING):
        self.name, self._observer, self._say = name, observer, say
        self._events: queue.Queue[_Event | None] = queue.Queue(most_waiting)
        self._overflowed = self._opened = False
        # A daemon: the end of the process does not wait for a library that hangs.
        self._thread = threading.Thread(target=self._pass_events, name=f"tracker-{name}", daemon=True)

    @property
    def has_nothing(self) -> bool:
        """Return whether the observer failed when it began a new run."""
        return self._observer.failed and not self._opened

    def open(self, run: RunDescription) -> None:
        """See :class:`Observer`."""
        self._opened = run.resumed
        self._put("open", run)

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """See :class:`Observer`."""
        self._put("start", after_step, evaluates_again)

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self._put("step", record)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        self._put("evaluation", progress, name, values)

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`Observer`."""
        self._put("samples", progress, samples)

    def save(self) -> None:
        """See :class:`Observer`."""
        self._put("save")

    def end(self, summary: Mapping[str, Any]) -> None:
        """See :class:`Observer`. The observer receives no later events."""
        self._put("end", summary)
        self._put_last()

    def wait(self, seconds: float) -> None:
        """Wait until the observer has handled all events, and print a note if ``seconds`` are not enough."""
        if not self._thread.is_alive():
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"note: {self.name} has not received all records in time; the next start of the run sends them")

    def _put(self, method: str, *arguments: Any) -> None:
        if self._overflowed:
            return
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._events.put_nowait((method, arguments))
        except queue.Full:
            # Without a gap in the middle, the next start of the run can send all that is missing.
            self._overflowed = True
            self._say(
                f"note: {self.name} is too slow: {self._events.maxsize:,} events wait for it, and it receives no more; "
                "training continues without it, and the next start of the run sends what is missing"
            )

    def _put_last(self) -> None:
        if self._thread.is_alive():
            with_room = time.monotonic() + 1.0
            while self._events.full() and time.monotonic() < with_room:
                time.sleep(0.01)
            if not self._events.full():
                self._events.put_nowait(None)

    def _pass_events(self) -> None:
        while (event := self._events.get()) is not None:
            method, arguments = event
            getattr(self._observer, method)(*arguments)
            self._opened |= method == "open" and not self._observer.failed
