"""Several ranks that stay alive for a whole test session, so that tests share one start-up and one process group."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from retemper.engine.parallel import mesh
from retemper.engine.parallel.process_group import Ranks

CPU = torch.device("cpu")
_SHOW_STACK = signal.SIGRTMIN  # runs handle SIGUSR2 themselves
_PATIENCE = 30.0
"""Seconds that other ranks have to answer after one has failed."""


class RankCluster:
    """``world_size`` gloo ranks, each a process, that run functions by name and send back what they return.

    A fresh process imports what all need, which takes seconds, and forks the ranks before it has threads or a group.
    Between two functions the ranks are stopped: a process group of gloo has threads that wake a hundred times a second,
    which would cost the other tests a third of a core.

    If some ranks do not answer, their stacks are shown, and the next function is run by new ranks.

    Args:
        world_size: number of ranks.
        parent_folder: in which the cluster makes a folder for its files.
        time_limit: seconds that a function may take. Less than what pytest-timeout gives a test, so that the failure
            tells what the ranks were doing.
    """

    def __init__(self, world_size: int, parent_folder: Path, time_limit: float = 240):
        self._world_size, self._parent_folder, self._time_limit = world_size, parent_folder, time_limit
        self._start()

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks", dir=self._parent_folder))
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(self._world_size)]
        self._pipes: list[Connection] = [ours for ours, _ in pipes]
        theirs = [their for _, their in pipes]
        self._parent = context.Process(target=_fork_ranks, args=(self._folder, theirs), daemon=True)
        self._parent.start()
        for their in theirs:
            their.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(ranks, *arguments)`` on every rank at once; the results by rank. A failure anywhere is raised."""
        self._signal(signal.SIGCONT)
        answers: dict[int, tuple[bool, Any]] = {}
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            self._receive(answers)
        finally:
            missing = [rank for rank in range(self._world_size) if rank not in answers]
            if missing:
                stacks = self._stacks(missing)
                self._kill()
                self._start()
            else:
                self._signal(signal.SIGSTOP)
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in sorted(answers.items()) if not ok]
        failures += [f"rank {rank} has not answered; it was here:\n{stacks[rank]}" for rank in missing]
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self._world_size)]

    def _receive(self, answers: dict[int, tuple[bool, Any]]) -> None:
        """Wait for the answers of all ranks; not for long after a failure, as others may wait for that rank forever."""
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        end = time.monotonic() + self._time_limit
        while waiting and (ready := wait(list(waiting), timeout=max(end - time.monotonic(), 0))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank, ok = waiting.pop(pipe), False
                with contextlib.suppress(EOFError):
                    ok, value = pipe.recv()
                    answers[rank] = ok, value
                if not ok:
                    end = min(end, time.monotonic() + _PATIENCE)

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Let ``ranks`` write where they are, and return that."""
        self._signal(_SHOW_STACK)
        time.sleep(1)
        return {rank: (self._folder / f"stack{rank}").read_text() for rank in ranks}

    def close(self) -> None:
        """End the ranks."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send(None)
        self._parent.join(30)
        self._kill()

    def _kill(self) -> None:
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


def _fork_ranks(folder: Path, pipes: list[Connection]) -> None:
    """The parent of the ranks: leads their process group, and ends after the last of them."""
    os.setpgid(0, 0)
    signal.signal(_SHOW_STACK, signal.SIG_IGN)
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
            _serve(rank, len(pipes), folder, pipe)
    # So that a rank that dies closes its pipe's last end.
    for pipe in pipes:
        pipe.close()
    for _ in pipes:
        os.wait()
    os._exit(0)


def _serve(rank: int, world_size: int, folder: Path, pipe: Connection) -> None:
    stack_file = (folder / f"stack{rank}").open("w")
    faulthandler.enable(stack_file)
    faulthandler.register(_SHOW_STACK, stack_file, all_threads=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
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
