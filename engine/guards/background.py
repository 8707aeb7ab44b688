"""Run long work on some ranks, such as a download, without blocking the others in a collective.

A collective that waits longer than ``parallel.timeout_seconds`` ends the run. So the work runs in a thread, and all
ranks join a short collective every second.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TypeVar, cast

from ..parallel.process_group import Ranks

Result = TypeVar("Result")
_SECONDS = 1.0


def run_in_background(
    ranks: Ranks,
    work: Callable[[], Result] | None,
    should_abort: Callable[[], bool] = lambda: False,
    abort: Callable[[], object] = lambda: None,
) -> Result | None:
    """Run ``work`` in a thread on every rank that has some. All ranks must call this.

    Args:
        ranks: all ranks.
        work: of this rank, or None.
        should_abort: called every second on all ranks; returns the same on all.
        abort: called if the work is useless: makes ``work`` end or raise soon.

    Returns:
        the result of ``work``, or None without work.

    Raises:
        UserError: on every rank, if the work of any rank failed.
    """
    with ThreadPoolExecutor(1, "background") as pool:
        future: Future[Result | None] = pool.submit(work) if work is not None else _done()
        try:
            while ranks.all_reduce(not future.done()):
                wait_for([future], timeout=_SECONDS)
                failed = future.done() and future.exception() is not None
                if should_abort() or ranks.all_reduce(failed):
                    abort()
        except BaseException:
            abort()
            raise
        return cast("Result | None", ranks.fail_together(future.result))


def _done() -> Future[Result | None]:
    future: Future[Result | None] = Future()
    future.set_result(None)
    return future
