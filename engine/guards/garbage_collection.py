"""Python's garbage collector, kept from stopping a rank at a moment of its own choosing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Import large libraries without collecting garbage, and leave what they are made of out of all later collections.

    The collector would look at hundreds of thousands of objects, which all stay, again and again: a third of the time
    of the imports. What exists on leaving is never collected, so that this comes before models and data. Where nothing
    is imported, since it has been before, nothing happens.
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
    """While entered, garbage is collected every ``interval`` steps, by all ranks at the same step, and never between.

    A collection takes tens of milliseconds in a large program, and every rank waits for the slowest: at moments of
    their own, n ranks make each other wait n times. An interval of 0 leaves the collector alone. The collector's former
    state is restored on leaving.
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
        """Collect if ``step`` is one of the schedule."""
        if self._interval and step % self._interval == 0:
            gc.collect()
