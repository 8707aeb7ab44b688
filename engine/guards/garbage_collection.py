"""Control when Python's garbage collector runs, because it stops a rank and all others wait."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Import large libraries without collecting garbage, and exclude their objects from later collections.

    The collector would scan hundreds of thousands of permanent objects repeatedly: a third of the import time. Objects
    that exist at the end are never collected, so use this before creating models and data. If nothing new is imported,
    nothing is excluded.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
        if len(sys.modules) > before:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


class GarbageCollection:
    """Collects garbage every ``interval`` steps on all ranks, and never in between, while it is entered.

    A collection takes tens of milliseconds in a large program, and every rank waits for the slowest one. If n ranks
    collect at different moments, they wait n times. An interval of 0 leaves the collector alone. Leaving restores the
    collector's former state.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._was_enabled = False

    def __enter__(self) -> GarbageCollection:
        self._was_enabled = gc.isenabled()
        if self._interval:
            gc.collect()
            gc.disable()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._interval and self._was_enabled:
            gc.enable()

    def step_done(self, step: int) -> None:
        """Collect if ``step`` is a multiple of the interval."""
        if self._interval and step % self._interval == 0:
            gc.collect()
