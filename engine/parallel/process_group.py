"""The process group of a run: one rank or many, started and left the same way.

A run started by plain ``python`` is a run with one rank: the group exists, needs no network, and every later line is
the same as under ``torchrun``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all: console, metrics and manifests."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Sum of a host number over all ranks, without touching the GPU."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item()

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        self.sum(0)

    def share(self, value):
        """The main rank's ``value`` (any picklable object) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


def world_size_from_environment() -> int:
    """Number of ranks that torchrun announces; 1 without it. Known before any rank is contacted."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device_name: str, timeout_seconds: int) -> Iterator[Ranks]:
    """Join the process group, and leave it cleanly after an undisturbed run.

    CPU tensors travel over gloo on every machine, so that control messages never wait for a GPU.

    Args:
        device_name: auto, cpu or cuda.
        timeout_seconds: longest wait of a collective.
    """
    device = _device(device_name)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    # After an error the group is left as it is: other ranks may be inside a collective, and shutting down would wait
    # for them. The launcher ends them when this process exits.
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # gloo may abort the interpreter's exit while tensors still hold on to the group.
    gc.collect()
    dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"device {name}: local rank {local_rank} has no GPU, this machine shows {count}; start at most {count} "
            "ranks per node (--nproc-per-node) or set device to cpu"
        )
    return torch.device("cuda", local_rank)
