"""Being asked to stop: SIGTERM and SIGINT are noticed at the next step boundary, by all ranks together."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from .parallel.process_group import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, the signals are remembered instead of ending the process.

    Launchers repeat a signal that the terminal has already sent, so a second one changes nothing.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._received: str | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop; the same answer on every rank. All ranks must call this."""
        return self._ranks.sum(self._received is not None) > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
