"""Several ranks that stay alive for a whole test session, so that tests share one start-up and one process group."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from retemper.engine.parallel.process_group import Ranks

CPU = torch.device("cpu")


class RankCluster:
    """``world_size`` gloo ranks, each a process, that run functions by name and send back what they return."""

    def __init__(self, world_size: int, rendezvous_file: str):
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, rendezvous_file, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(ranks, *arguments)`` on every rank at once; the results by rank. A failure anywhere is raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = [pipe.recv() for pipe in self._pipes]
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(results) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
            process.kill()


def _serve(rank: int, world_size: int, rendezvous_file: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=world_size)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((True, function(Ranks(rank, world_size, CPU), *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    # The interpreter's own shutdown may abort inside gloo; every result has been sent.
    os._exit(0)
