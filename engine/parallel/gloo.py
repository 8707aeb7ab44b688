"""Let each process group of gloo have one thread that runs its collectives.

PyTorch gives it two. When both finish a collective at once, both assign the name of the last one to the same string
without a lock (``lastCompletedWorkName`` in ``ProcessGroupGloo::runLoop``, torch/csrc/distributed/c10d/
ProcessGroupGloo.cpp; seen in PyTorch 2.13). That damages the memory of the process: it crashes or hangs later, in any
place. Two collectives are in flight whenever one is not waited for at once, for example with tensor parallelism.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d


class OneThreadGloo(ProcessGroupGloo):
    """As PyTorch creates it, but for the number of threads.

    Args:
        store: of the group.
        rank: of this process in the group.
        size: number of ranks.
        timeout: of a collective.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_default_device()]
        options._timeout = timeout
        options._threads = 1
        super().__init__(store, rank, size, options)


def use_one_thread() -> None:
    """Let this process create its groups of gloo with one thread each."""
    # PyTorch creates them by this name, and takes no options for gloo.
    distributed_c10d.ProcessGroupGloo = OneThreadGloo  # type: ignore[misc]
