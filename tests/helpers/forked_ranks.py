"""Runs of several ranks in processes that are forked for one run each, so that a run can be killed."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import LIMIT_SECONDS
from tqdm import tqdm

from retemper.engine.parallel.process_group import Ranks

CPU = torch.device("cpu")


def run_process(context: ForkServerContext, log: Path, function: Callable[..., Any], *arguments: Any) -> None:
    """``function(*arguments)`` in a process of its own. A failure there is raised here, with all that it printed."""
    _finish([_start(context, log, function, *arguments)], [log], 0)


def run_ranks(
    context: ForkServerContext, world_size: int, log: Path, function: Callable[..., Any], *arguments: Any, code: int = 0
) -> None:
    """``function(ranks, *arguments)`` on gloo ranks, each a process of its own.

    Args:
        context: the :func:`forked.fork_server`.
        world_size: number of ranks.
        log: file for the output of rank 0; the others add their number.
        function: what the ranks do.
        arguments: of the function.
        code: how all of them end: 0, or minus the signal that kills them. The first one killed takes the others along.
    """
    logs = [log if rank == 0 else log.with_suffix(f".{rank}.log") for rank in range(world_size)]
    rendezvous = log.with_suffix(".rendezvous")
    started = [
        _start(context, path, _rank, rank, world_size, rendezvous, function, *arguments)
        for rank, path in enumerate(logs)
    ]
    _finish(started, logs, code)


def _start(context: ForkServerContext, log: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    process = context.Process(target=_call, args=(log, function, arguments))
    process.start()
    return process


def _finish(processes: list[Any], logs: list[Path], code: int) -> None:
    """Wait for all, or until one ends badly; then end the others, and raise if one has not ended with ``code``."""
    running, deadline = {process.sentinel: process for process in processes}, time.monotonic() + LIMIT_SECONDS
    while running and (ended := wait(running, deadline - time.monotonic())):
        codes = [running.pop(sentinel).exitcode for sentinel in ended]
        if any(codes):
            break
    first = next((rank for rank, process in enumerate(processes) if process.exitcode), 0)
    found = processes[first].exitcode
    for process in processes:
        process.kill()
        process.join()
    if found != code:
        said = logs[first].read_text()[-3000:] if logs[first].exists() else "it did not start"
        raise AssertionError(f"ended with {found} instead of {code}: {said}")


def _call(log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run a function as all that a process does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    gc.freeze()  # collections then skip what the server has imported
    tqdm.set_lock(threading.RLock())  # its own one between processes would outlive a process that is killed
    code = 0
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    # The interpreter's own shutdown may abort inside gloo; everything is on the disk.
    os._exit(code)


def _rank(rank: int, world_size: int, rendezvous: Path, function: Callable[..., Any], *arguments: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    function(Ranks(rank, world_size, CPU), *arguments)
    dist.barrier()  # gloo: a rank that leaves early breaks what the others still send


def die() -> None:
    """End this process as a power failure does."""
    os.kill(os.getpid(), signal.SIGKILL)
