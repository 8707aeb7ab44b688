"""Show the progress of long work: a bar in a terminal, a line every 30 seconds otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

from .console import live_output
from .progress import duration
from .terminal import shows_bars

FIRST_SECONDS = 10.0
LINE_SECONDS = 30.0
Say = Callable[[str], None]


def rank0_printer(active: bool) -> Callable[..., None]:
    """Return a function that prints lines for people, or does nothing unless ``active``."""

    def say(*lines: str) -> None:
        for line in lines if active else ():
            tqdm.write(line)  # above the bars on standard output and standard error

    return say


@contextmanager
def report_if_slow(what: str, say: Say) -> Iterator[None]:
    """Print the elapsed time of slow work inside: after 10 seconds, and then every 30.

    Args:
        what: the work, in words.
        say: prints a line; called from a thread.
    """
    done, began = threading.Event(), time.perf_counter()

    def report() -> None:
        seconds = FIRST_SECONDS
        while not done.wait(seconds):
            say(f"  {what}: {duration(time.perf_counter() - began)} so far")
            seconds = LINE_SECONDS

    thread = threading.Thread(target=report, name="slow-work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class ProgressBar:
    """Shows the progress of work of a known amount.

    Args:
        what: the work, in words.
        total: its amount.
        say: prints a line.
        active: whether this rank prints.
        setting: ``logging.progress_bar``.
    """

    def __init__(
        self, what: str, total: int, say: Say, active: bool = True, setting: Literal["auto", "on", "off"] = "auto"
    ):
        self._what, self._total, self._say, self._active = what, total, say, active
        self._done, self._began = 0, time.perf_counter()
        self._next = self._began + LINE_SECONDS
        stream = live_output()
        shown = active and shows_bars(stream, setting)
        self._bar = tqdm(total=total, desc=f"  {what}", file=stream, leave=False, delay=2) if shown else None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, amount: int) -> None:
        """Add ``amount`` of finished work."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._active and (now := time.perf_counter()) >= self._next:
            self._next = now + LINE_SECONDS
            left = (now - self._began) / self._done * (self._total - self._done) if self._done else 0.0
            self._say(f"  {self._what}: {self._done} of {self._total}, {duration(left)} left")
