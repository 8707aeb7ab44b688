"""Runs tasks in worker processes, and stops them after an error, Ctrl-C or a killed worker."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from ....engine.errors import UserError
from ...tokenizer.handle import TokenizerHandle, TokenizerSpec
from . import shared_tokenizer
from .task_output import TaskResult
from .tasks import Task
from .worker import TaskRunner, WorkerSettings, run_task, start_worker

_TICK_SECONDS = 0.2


def may_fork() -> bool:
    """Return whether this process is known to have only one thread.

    A fork copies locks that other threads hold, which the child then waits for forever.
    """
    threads = Path("/proc/self/task")  # those of libraries too; Linux
    return threads.is_dir() and len(list(threads.iterdir())) == 1


def worker_context() -> Any:
    """Return how workers are started that cannot be forked from this process.

    The fork server imports the libraries and loads the tokenizer once for all workers. Platforms without one spawn.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([shared_tokenizer.__name__, run_task.__module__])
    return context


def shared_counters(number: int) -> Any:
    """Return ``number`` int64 zeros in shared memory."""
    return worker_context().RawArray("q", number)


def start_early(tokenizer: TokenizerSpec) -> None:
    """Start loading the libraries and the tokenizer for the workers in the background.

    Args:
        tokenizer: with the user's ``eod_token``; None: the tokenizer's own.
    """
    shared_tokenizer.announce(tokenizer)
    if worker_context().get_start_method() == "forkserver":
        # Python 3.11 does not pass sys.path on: the fork server would import an installed copy of this package.
        path = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
        before = {name: os.environ.get(name) for name in path}
        os.environ.update(path)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.update({name: value for name, value in before.items() if value is not None})
            for name in [name for name, value in before.items() if value is None]:
                del os.environ[name]


def run_here(
    tasks: Sequence[tuple[Task, str]],
    tokenizer: TokenizerHandle,
    settings: WorkerSettings,
    progress: Any,
    on_tick: Callable[[], None],
) -> Generator[TaskResult, None, None]:
    """Like :func:`run_tasks`, in this process and with its tokenizer."""
    runner = TaskRunner(settings, progress, tokenizer)
    for task, key in tasks:
        yield runner.run(task, key)
        on_tick()


def run_tasks(
    tasks: Sequence[tuple[Task, str]],
    workers: int,
    tokenizer: TokenizerHandle,
    settings: WorkerSettings,
    progress: Any,
    on_tick: Callable[[], None],
) -> Generator[TaskResult, None, None]:
    """Run ``tasks``, each with the key of its output, in ``workers`` processes; yield the results in any order.

    Close the generator (``contextlib.closing``) to stop early: this ends the workers.

    Args:
        tokenizer: forked workers inherit it.
        progress: see ``TaskRunner``.
        on_tick: called several times a second.

    Raises:
        UserError: from the first task that fails, or a worker was killed.
        FastPathError: the fast tokenizer failed its check.
    """
    bystanders = set(multiprocessing.active_children())
    pool = _pool(workers, tokenizer, settings, progress)
    try:
        waiting = iter(tasks)
        running: set[Future[TaskResult]] = set()
        while True:
            # Two tasks for each worker keep all busy, and bound what is lost when the run is stopped.
            while len(running) < 2 * workers and (task := next(waiting, None)) is not None:
                running.add(pool.submit(run_task, *task))
            if not running:
                return
            done, running = wait(running, _TICK_SECONDS, FIRST_COMPLETED)
            on_tick()
            for future in done:
                yield future.result()
    except BaseException as error:
        for worker in set(multiprocessing.active_children()) - bystanders:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process was killed, most often because memory ran out; try fewer --workers"
            ) from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int, tokenizer: TokenizerHandle, settings: WorkerSettings, progress: Any) -> ProcessPoolExecutor:
    """Return a pool of workers: forked from this process with its tokenizer if it has one thread, the cheapest way."""
    if not may_fork():
        if settings.tokenizer is not None:
            start_early(settings.tokenizer)
        return ProcessPoolExecutor(workers, worker_context(), start_worker, (settings, progress))
    _ = tokenizer.encoder  # loads the fast path, for all workers
    gc.freeze()  # a collection in a worker would write to all inherited objects, and so copy them
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, context, start_worker, (settings, progress, tokenizer))
