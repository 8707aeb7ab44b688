"""Progress of a run on stderr: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

_LOG_SECONDS = 60.0


class ProgressReport:
    """Shows the input bytes read so far, MB/s, tokens/s and the time left. A context manager.

    Args:
        counters: see :class:`retemper.tools.ingest.worker.TaskRunner`; they move within a task.
        total_bytes: input bytes on disk.
    """

    def __init__(self, counters: Any, total_bytes: int) -> None:
        self._counters = np.frombuffer(counters, dtype=np.int64).reshape(-1, 2)
        self._total_bytes = total_bytes
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(
            total=total_bytes,
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

    def update(self) -> None:
        """Show the counters as they are now."""
        done, tokens = (int(total) for total in self._counters.sum(axis=0))
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._logged >= _LOG_SECONDS:
            self._logged = now
            left = seconds * (self._total_bytes - done) / max(done, 1)
            print(
                f"{done / 1e6:,.0f} of {self._total_bytes / 1e6:,.0f} MB, {done / 1e6 / seconds:,.1f} MB/s, "
                f"{tokens / seconds:,.0f} tokens/s, {left / 60:,.0f} min left",
                file=sys.stderr,
                flush=True,
            )
