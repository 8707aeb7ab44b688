"""Limits the time, memory and output of rendering a chat template.

A template is a program from a downloaded folder. Endless loops, strings of gigabytes and numbers of a million digits
must be refused, and not hang or kill a worker. Jinja's sandbox limits ``range`` and what a template can reach, not:

- time: an alarm interrupts Python code, in the main thread, where workers and the command render;
- memory: a limit on the address space turns a huge allocation into a MemoryError;
- ``**``: a single operation can take hours without a chance to interrupt it, even while the template is compiled. No
  chat template needs it, so templates with it are refused before compilation;
- output: characters in proportion to those of the conversation.
"""

from __future__ import annotations

import atexit
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

from ....engine.errors import UserError

MAX_SECONDS = 5.0
"""Processor time of one rendering. A conversation of a hundred megabytes takes about one second."""
MAX_FAILURES = 3
"""Renderings that exceed a limit before the template itself is refused."""
MAX_BYTES = 1 << 30
"""Additional address space for rendering."""
MAX_SOURCE = 1_000_000
"""Characters of a template. Well-known models have at most some 30,000."""
FREE_OUTPUT, _OUTPUT_RATIO = 1_000_000, 100
"""A conversation of n characters may be rendered to FREE_OUTPUT + _OUTPUT_RATIO * n characters."""
_Result = TypeVar("_Result")
_STATM = Path("/proc/self/statm")
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


class TooCostlyError(Exception):
    """Rendering exceeded a limit; the reason in words."""


class _TimeoutError(BaseException):
    """Not an Exception: Jinja catches those while it computes constants."""


def check_source(source: str, origin: str) -> None:
    """Raise UserError for a template that is too long or uses ``**``."""
    if len(source) > MAX_SOURCE:
        raise UserError(
            f"{origin}: a chat template of {len(source):,} characters; at most {MAX_SOURCE:,} are supported"
        )
    if "**" not in source:
        return
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(_GENERATION.sub("", source))
    except (Exception, RecursionError):
        return  # Not valid: rendering reports it before it computes anything.
    if power := tree.find(nodes.Pow):
        raise UserError(
            f"{origin}: line {power.lineno} of the chat template uses **, which can compute without end; give "
            "--chat-template FILE with a template without it"
        )


def check_output(text: str, characters: int) -> None:
    """Raise TooCostlyError if ``text`` is out of proportion to a conversation of ``characters`` characters."""
    if len(text) > FREE_OUTPUT + _OUTPUT_RATIO * characters:
        raise TooCostlyError(f"it writes {len(text):,} characters for a conversation of {characters:,}")


class _Alarm:
    """One timer for many renderings: setting it for each would cost more than all other limits.

    At most every MAX_SECONDS it checks whether the rendering of its last check is still running, and how much processor
    time that has used since. Time in which the process waits does not count. A rendering is stopped after one to two
    times MAX_SECONDS.
    """

    def __init__(self) -> None:
        self._installed: bool | None = None
        self._armed = False
        self._running = False
        self._number = 0
        """Of renderings so far."""
        self._found = (0, 0.0)
        """Number of the rendering at the last check, and the processor time then."""

    def start(self) -> None:
        self._number += 1
        if not self._armed:
            self._arm()
        self._running = True

    def stop(self) -> None:
        self._running = False

    def _arm(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._installed is None:
            # Leave the signal to a program that uses it.
            self._installed = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
            if self._installed:
                signal.signal(signal.SIGALRM, self._fire)
                signal.siginterrupt(signal.SIGALRM, False)
                # At exit Python restores the default action, which would kill the process.
                atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.0)
        if self._installed:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)

    def _fire(self, signum: int, frame: FrameType | None) -> None:
        if not self._running:
            self._armed = False
            return
        now = time.thread_time()
        if self._found[0] != self._number:
            self._found = (self._number, now)
        left = self._found[1] + MAX_SECONDS - now
        signal.setitimer(signal.ITIMER_REAL, max(left, 1.0))  # once more, should the exception be swallowed
        if left <= 0.0:
            raise _TimeoutError


class _MemoryLimit:
    """A limit on the address space, as a context manager. Nested contexts cost nothing."""

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None
        self._limit = -1
        """Bytes; -1: not measured yet, or no limit here."""
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            if self._before is None:
                self.measure()
            self._set(self._limit)

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._before is not None:
            self._set(self._before[0])

    def measure(self) -> None:
        """Set the limit from the current size of the process, which may have grown for other reasons."""
        try:
            size = int(_STATM.read_bytes().split()[0]) * resource.getpagesize()
        except OSError:  # macOS, which also refuses to set this limit
            return
        if self._before is None:
            self._before = resource.getrlimit(resource.RLIMIT_AS)
        self._limit = size + MAX_BYTES
        if self._before[0] != resource.RLIM_INFINITY:
            self._limit = min(self._limit, self._before[0])
        if self._depth:
            self._set(self._limit)

    def _set(self, soft: int) -> None:
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_AS, (soft, self._before[1]))


memory_limit = _MemoryLimit()
_alarm = _Alarm()


def render_within_limits(render: Callable[[], _Result]) -> _Result:
    """Return ``render()``. Raise TooCostlyError if it exceeds a limit of time or memory."""
    try:
        with memory_limit:
            try:
                return _timed(render)
            except MemoryError:
                memory_limit.measure()
            return _timed(render)
    except MemoryError:
        raise TooCostlyError(f"it takes more than {MAX_BYTES >> 30} GiB of memory") from None
    except _TimeoutError:
        raise TooCostlyError(f"it takes more than {MAX_SECONDS:.0f} s") from None


def _timed(render: Callable[[], _Result]) -> _Result:
    _alarm.start()
    try:
        return render()
    finally:
        _alarm.stop()
