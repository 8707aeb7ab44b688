"""Several ranks that stay alive for a whole test session, so that tests share one start-up and one process group."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from retemper.engine.parallel import mesh
from retemper.engine.parallel.process_group import Ranks

CPU = torch.device("cpu")


class RankCluster:
    """``world_size`` gloo ranks, each a process, that run functions by name and send back what they return.

    A fresh process imports what all need, which takes seconds, and forks the ranks before it has threads or a group.
    Between two functions the ranks are stopped: a process group of gloo has threads that wake a hundred times a second,
    which would cost the other tests a third of a core.
    """

    def __init__(self, world_size: int, rendezvous_file: str):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world_size)]
        self._pipes: list[Connection] = [ours for ours, _ in pipes]
        theirs = [their for _, their in pipes]
        self._parent = context.Process(target=_fork_ranks, args=(rendezvous_file, theirs), daemon=True)
        self._parent.start()
        for their in theirs:
            their.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(ranks, *arguments)`` on every rank at once; the results by rank. A failure anywhere is raised."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = [pipe.recv() for pipe in self._pipes]
        self._signal(signal.SIGSTOP)
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(results) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        """End the ranks."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send(None)
        self._parent.join(30)
        self._signal(signal.SIGKILL)
        self._parent.join()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the ranks and their parent, once that leads their process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._parent.pid, number)


def share_meshes() -> None:
    """Let all runs in this process that are laid out alike use one mesh.

    Every process group of gloo has a thread that wakes a hundred times a second; those of hundreds of runs would keep
    two cores busy. They cannot be closed: DTensor's caches take meshes of equal layout for one another.
    """
    build, shared = mesh.build_mesh, functools.cache(mesh.build_mesh)

    def build_or_share(layout: mesh.Layout, device_type: str, expert: int = 1) -> mesh.Mesh:
        return (build if dist.get_backend() == "fake" else shared)(layout, device_type, expert)

    mesh.build_mesh = build_or_share


def _fork_ranks(rendezvous_file: str, pipes: list[Connection]) -> None:
    """The parent of the ranks: leads their process group, and ends after the last of them."""
    os.setpgid(0, 0)
    for name in ("guards.run_guards", "observe.reporter", "observe.start_summary", "pretrain", "start"):
        importlib.import_module(f"retemper.engine.{name}")
    # Test files import these, and ranks import the test files whose functions they run.
    for name in ("hypothesis", "pytest", "tiny_run"):
        importlib.import_module(name)
    # What has been imported stays: no rank looks for garbage in it, which would also copy its pages.
    gc.collect()
    gc.freeze()
    for rank, pipe in enumerate(pipes):
        if os.fork() == 0:
            for other in pipes[:rank] + pipes[rank + 1 :]:
                other.close()
            _serve(rank, len(pipes), rendezvous_file, pipe)
    # So that a rank that dies closes its pipe's last end.
    for pipe in pipes:
        pipe.close()
    for _ in pipes:
        os.wait()
    os._exit(0)


def _serve(rank: int, world_size: int, rendezvous_file: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=world_size)
    share_meshes()
    try:
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                outcome = True, function(Ranks(rank, world_size, CPU), *arguments)
            except BaseException:
                outcome = False, traceback.format_exc()
            pipe.send(outcome)
    finally:
        # The interpreter's own shutdown may abort inside gloo; every result has been sent.
        os._exit(0)
