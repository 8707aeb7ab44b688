"""Progress of a run on stderr: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_LOG_SECONDS = 60.0


class _Bar(tqdm):
    monitor_interval = 0  # no thread that refreshes the bar: workers are forked while it is shown


class ProgressReport:
    """Shows a stage's name, the bytes done so far, MB/s, tokens/s, bad records and the time left. A context manager.

    Args:
        stage: its name.
        total_bytes: bytes of the whole stage.
        done_before: bytes that were done when it began, by a run that was interrupted.
    """

    def __init__(self, stage: str, total_bytes: int, done_before: int = 0) -> None:
        self._stage, self._total_bytes, self._done_before = stage, total_bytes, done_before
        self._started = self._logged = time.monotonic()
        self._bar = _Bar(
            desc=stage,
            total=total_bytes,
            initial=done_before,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
        )

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, done: int, tokens: int | None = None, bad: int = 0) -> None:
        """Show that ``done`` bytes of the stage are done, in this run with ``tokens`` tokens if it makes some."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        speed = "" if tokens is None else f"{tokens / seconds:,.0f} tokens/s"
        speed += f", {bad:,} bad records" if bad else ""
        if not self._bar.disable:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._logged >= _LOG_SECONDS:
            self._logged = now
            rate = max(done - self._done_before, 1) / seconds
            parts = [
                f"{self._stage}: {done / 1e6:,.0f} of {self._total_bytes / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s",
                *([speed] if speed else []),
                f"{(self._total_bytes - done) / rate / 60:,.0f} min left",
            ]
            print(", ".join(parts), file=sys.stderr, flush=True)
