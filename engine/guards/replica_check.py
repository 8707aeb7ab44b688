"""Detect silent data corruption: compare replicated weights and optimizer states bit for bit.

Replicas start equal and get equal updates, and nothing else compares them. So if a bit flips in one rank's memory, or
a GPU miscomputes, a replica diverges unnoticed. The placement of each tensor on the mesh tells which ranks replicate
it: hybrid sharding replicates all, tensor parallelism the norms. Tensors without replicas, as with plain sharding,
cannot be checked, and a tied embedding is not compared between the ends of a pipeline. Constants of a model are not
sharded: all ranks with the layers hold them.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..optim import TrainingOptimizer
from ..optim.local import local_part
from ..parallel.forward_backward import ModelParts
from ..parallel.process_group import Ranks
from ..weights.checkpoint.tensors import OPTIMIZER_PREFIX, checkpoint_tensors, model_tensors

_CHUNK = 2**22
"""Number of elements hashed at a time: temporaries take about 32 bytes for each, 128 MiB."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x5851F42D4C957F2D  # of Knuth's MMIX generator; odd
# 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers.
_GOLDEN, _FACTORS = -7046029254386353131, (-4658895280553007687, -7723592293110705685)

Owners = tuple[int, ...]
"""The ranks that hold the same part of a tensor, in order."""


class ReplicaCheck:
    """Compares replicas every ``interval`` steps.

    Args:
        interval: number of steps; 0: never.
        ranks: that train together.
        pipeline: number of groups of consecutive ranks, of which each holds other layers.
        newest: names the newest checkpoint, for messages.
    """

    def __init__(self, interval: int, ranks: Ranks, pipeline: int, newest: Callable[[], str]):
        self._interval, self._ranks, self._newest = interval, ranks, newest
        size = ranks.world_size // pipeline
        first = ranks.rank // size * size
        self._same_layers: Owners = tuple(range(first, first + size))
        self._passed: int | None = None

    def due(self, step: int) -> bool:
        """Return whether replicas are compared after ``step``."""
        return self._interval > 0 and step % self._interval == 0

    def __call__(self, step: int, model: ModelParts, optimizer: TrainingOptimizer) -> None:
        """Compare replicas. All ranks must call this; it waits for the device.

        Args:
            step: number of steps made, for messages.
            model: this rank's part.
            optimizer: of its parameters, with states.

        Raises:
            UserError: on all ranks, naming the ranks with different bits and the first tensor that differs.
        """
        tensors = {**model_tensors(model), **checkpoint_tensors(model, optimizer)}  # also the base of an adapter
        owners = {name: owners_of(tensor) for name, tensor in tensors.items()}
        for name, parameter in model.named_parameters():
            if name in model.constants:
                owners[name] = self._same_layers
            # States that are not sharded, such as a count of steps, are replicated wherever the parameter is.
            for state in optimizer.state.get(parameter, {}):
                if not isinstance(tensors[f"{OPTIMIZER_PREFIX}{state}.{name}"], DTensor):
                    owners[f"{OPTIMIZER_PREFIX}{state}.{name}"] = _all_holders(parameter)
        hashes = hash_tensors(tensors)
        mine: dict[Owners, list[str]] = {}
        for name in tensors:
            if len(owners[name]) > 1:
                mine.setdefault(owners[name], []).append(name)
        # One hash for all tensors with the same owners; the hashes of single tensors are sent only if it differs.
        notes = self._ranks.all_gather(
            {group: digest({name: hashes[name] for name in names}) for group, names in mine.items()}
        )
        odd = {group for note in notes for group in note if len({notes[rank].get(group) for rank in group}) > 1}
        if odd:
            here = {group: {name: hashes[name] for name in mine[group]} for group in odd & mine.keys()}
            details = self._ranks.all_gather((socket.gethostname(), here))
            raise UserError(self._line(step, min(odd), details))
        self._passed = step

    def _line(self, step: int, group: Owners, details: list[tuple[str, dict[Owners, dict[str, int]]]]) -> str:
        tables = {rank: details[rank][1][group] for rank in group}
        first = tables[group[0]]
        # After one step with a different tensor most tensors differ: report the first in the model's order.
        name = next(name for name in first if len({table.get(name) for table in tables.values()}) > 1)
        values = Counter(table.get(name) for table in tables.values())
        (usual, count), *_ = values.most_common()
        agreeing = [rank for rank in group if tables[rank].get(name) == usual]
        others = [rank for rank in group if rank not in agreeing]
        named = ", ".join(f"{rank} ({details[rank][0]})" for rank in others[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        against = f"rank {agreeing[0]} ({details[agreeing[0]][0]})" + (f" and {count - 1} more" if count > 1 else "")
        since = "the start" if self._passed is None else f"step {self._passed}, the last check, when all were equal"
        return (
            f"step {step}: rank{'s' if len(others) > 1 else ''} {named}{more} and {against} hold different values of "
            f"{name}, which must be the same bit for bit: memory, a GPU or a link of one of them failed since {since}, "
            f"and checkpoints written since then may hold it; {self._newest()}"
        )


def owners_of(parameter: Tensor) -> Owners:
    """Return the ranks that hold the same part of ``parameter`` as this one, including it; none for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return ()
    place = parameter.device_mesh.get_coordinate()
    assert place is not None
    index = tuple(
        slice(None) if placement.is_replicate() else at
        for placement, at in zip(parameter.placements, place, strict=True)
    )
    return tuple(sorted(parameter.device_mesh.mesh[index].flatten().tolist()))


def _all_holders(parameter: Tensor) -> Owners:
    return tuple(sorted(parameter.device_mesh.mesh.flatten().tolist())) if isinstance(parameter, DTensor) else ()


def digest(hashes: Mapping[str, int]) -> str:
    """Return one hash of all ``hashes``, in their order."""
    text = "".join(f"{name} {value}\n" for name, value in hashes.items())
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a 64-bit hash of this rank's part of every tensor, computed on its device; waits once for each device.

    Tensors that differ in one element always have different hashes. If several elements differ, hashes are equal with a
    probability of 2^-32 (if only signs differ) or much less.
    """
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(local_part(tensor).device, []).append(name)
    hashes: dict[str, int] = {}
    for device, names in by_device.items():
        largest = max(local_part(tensors[name]).numel() for name in names)
        weights = odd_numbers(min(_CHUNK, largest), device)
        found = torch.stack([_hash(local_part(tensors[name]), weights) for name in names])
        hashes.update(zip(names, found.tolist(), strict=True))
    return {name: hashes[name] for name in tensors}


def _hash(tensor: Tensor, weights: Tensor) -> Tensor:
    """Return [] int64: the sum of the elements' bits times ``weights`` modulo 2^64, exact in any order."""
    flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in flat.split(_CHUNK):
        total = total * _MULTIPLIER + (chunk * weights[: len(chunk)]).sum()
    return total


def odd_numbers(count: int, device: torch.device) -> Tensor:
    """Return [count] int64 odd pseudo-random numbers on ``device``: ``splitmix.mix64`` of 0, 1, ..."""
    bits = torch.arange(count, dtype=torch.int64, device=device) * _GOLDEN
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        bits = (bits ^ _shifted(bits, shift)) * factor
    return (bits ^ _shifted(bits, 31)) | 1


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return the unsigned shift ``bits >> by``."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
