"""Run long work on some ranks, such as a download, without blocking the others in a collective.

A collective that waits longer than ``parallel.timeout_seconds`` ends the run, which is for training. Here all ranks
meet every second instead, while the work is done in a thread.
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
    """Run ``work`` on every rank that has some. All ranks must call this.

    Args:
        ranks: those that wait for one another.
        work: what this rank does, in a thread; None: nothing.
        should_abort: asked now and then by all ranks together, to give the same answer on all: whether to give up.
        abort: called when there is no use in going on: makes ``work`` raise soon.

    Returns:
        what ``work`` returned; None where this rank had none.

    Raises:
        UserError: on every rank, where the work of any has failed.
    """
    with ThreadPoolExecutor(1, "apart") as pool:
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
