"""Manage the process group of a run: one rank or many, started and left the same way.

A run started by plain ``python`` is a run with one rank: the group exists and needs no network, and all other code is
the same as under ``torchrun``.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from ..errors import UserError
from ..guards.liveness import BACKGROUND_GROUP, Liveness
from ..guards.rendezvous import Rendezvous, join
from .gloo import use_one_thread
from .launcher import read_launcher

Result = TypeVar("Result")
_SHORTEST_COLLECTIVE_LIMIT = 3600.0  # seconds

# PyTorch's own code calls functions that PyTorch is about to rename, and would warn the user on every rank.
warnings.filterwarnings("ignore", message=".*torch.distributed.all_gather_into_tensor", category=FutureWarning)
use_one_thread()


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group, seen from this one."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Group for control messages; None: the default group."""
    store: dist.Store | None = None
    """The launcher's store, for messages that are not collectives."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes console output, metrics and manifests."""
        return self.rank == 0

    def with_own_group(self) -> Ranks:
        """Return the same ranks with a process group of their own, for messages of another thread that may take long.

        All ranks must call this, and check in another way that all are alive.
        """
        return replace(
            self, group=dist.new_group(backend="gloo", timeout=timedelta(days=1), group_desc=BACKGROUND_GROUP)
        )

    def all_reduce(self, value: float) -> float:
        """Return the sum of a host number over all ranks, without using the GPU."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.group)
        return total.item()

    def broadcast(self, value):
        """Return the main rank's ``value`` (any picklable object) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def all_gather(self, value: Result) -> list[Result]:
        """Return every rank's ``value`` (any picklable object), by rank, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def fail_together(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` on every rank. If it fails on some, all raise, so that no rank waits for another forever.

        Raises:
            UserError: this rank's own problem, or else that of the first rank that has one.
        """
        problem, result = _attempt(action)
        self.raise_on_all(problem)
        return cast(Result, result)

    def run_on_rank0(self, action: Callable[[], Result]) -> Result | None:
        """Run ``action`` on the main rank while the others wait; its exceptions are raised on all.

        Returns:
            The result of ``action`` on the main rank, None on others.
        """
        problem, result = _attempt(action) if self.is_main else (None, None)
        self.raise_on_all(problem)
        return result

    def raise_on_all(self, problem: str | None) -> None:
        """Raise if any rank has a problem. All ranks must call this."""
        problems = self.all_gather(problem)
        found = problem or next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), None)
        if found:
            raise UserError(found)


def _attempt(action: Callable[[], Result]) -> tuple[str | None, Result | None]:
    """Return (problem for the user, None) or (None, result)."""
    try:
        return None, action()
    except UserError as error:
        return str(error), None
    except OSError as error:
        return f"{error.filename or 'file system'}: {error.strerror or error}", None


@contextmanager
def process_group(device_name: str, timeout_seconds: int, rendezvous: Rendezvous | None = None) -> Iterator[Ranks]:
    """Join the process group, and leave it cleanly after a successful run.

    CPU tensors use gloo on every machine, so that control messages never wait for a GPU. If there are several ranks,
    they are watched: when one falls silent, this process reports it and ends with status 1.

    Args:
        device_name: auto, cpu or cuda.
        timeout_seconds: how long ranks wait for one that is silent, or does not join a collective.
        rendezvous: of the ranks, if they have joined it already.
    """
    if not read_launcher().launched:
        with _joined(device_name, timeout_seconds, dist.HashStore(), 0, 1) as ranks:
            yield ranks
        return
    rendezvous = rendezvous or join({}, timeout_seconds)
    liveness = Liveness(rendezvous, timeout_seconds)
    # The watcher reports first: it knows more than the failing collective, whose timeout also includes the time in
    # which all ranks were suspended.
    limit = max(_SHORTEST_COLLECTIVE_LIMIT, 10 * timeout_seconds)
    with liveness, _joined(device_name, limit, rendezvous.store, rendezvous.rank, rendezvous.world_size) as ranks:
        yield ranks


@contextmanager
def _joined(device_name: str, timeout_seconds: float, store: dist.Store, rank: int, world_size: int) -> Iterator[Ranks]:
    device = _device(device_name)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # After an error the group is not shut down: other ranks may be inside a collective, and a shutdown would wait for
    # them. The launcher ends them when this process exits.
    yield Ranks(rank, world_size, device, store=store)
    # gloo may abort the interpreter's exit while tensors still reference the group.
    gc.collect()
    dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = read_launcher().local_rank
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(f"device {name}: PyTorch sees no GPU on this machine; set device to cpu or auto")
    if local_rank >= count:
        raise UserError(
            f"device {name}: local rank {local_rank} has no GPU, this machine shows {count}; start at most {count} "
            "ranks per node (--nproc-per-node) or set device to cpu"
        )
    return torch.device("cuda", local_rank)
