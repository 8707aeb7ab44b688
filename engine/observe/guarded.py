"""Pass events to observers that may fail, such as trackers, which need a network, and the callbacks of users."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..files.masking import without_secrets
from ..schedule import Progress
from .observer import Observer, RunDescription, Sample, StepRecord

if TYPE_CHECKING:
    from .waiting import Say


class Guarded(Observer):
    """Passes events to ``observer`` until its first exception, which is printed.

    Args:
        name: of the observer, for people.
        observer: that may fail.
        remedy: what the user may do, for the line.
        say: prints a line for people.
        with_traceback: whether to print more than one line of an exception, for code of users.
    """

    def __init__(self, name: str, observer: Observer, remedy: str, say: Say, with_traceback: bool = False):
        self.name, self._observer, self._remedy, self._say = name, observer, remedy, say
        self._with_traceback = with_traceback
        self.failed = False

    def open(self, run: RunDescription) -> None:
        """See :class:`Observer`."""
        self._call("open", run)

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """See :class:`Observer`."""
        self._call("start", after_step, evaluates_again)

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self._call("step", record)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        self._call("evaluation", progress, name, values)

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`Observer`."""
        self._call("samples", progress, samples)

    def save(self) -> None:
        """See :class:`Observer`."""
        self._call("save")

    def end(self, summary: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        self._call("end", summary)

    def _call(self, method: str, *arguments: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self._observer, method)(*arguments)
        except BaseException as error:  # libraries have raised SystemExit and KeyboardInterrupt
            from_signal = not isinstance(error, (Exception, SystemExit))
            if from_signal and threading.current_thread() is threading.main_thread():
                raise
            self.failed = True
            reason = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            self._say(f"note: {self.name} failed: {reason}; training continues without it; {self._remedy}")
            if self._with_traceback:
                self._say(without_secrets("".join(traceback.format_exception(error)).rstrip()))
