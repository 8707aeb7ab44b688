"""Lay out the ranks of a run on the axes of a device mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import ParallelConfig
from ..errors import UserError


class Layout(NamedTuple):
    """Sizes of the mesh axes, outermost first: neighbouring ranks, which are in one node, share a tensor axis."""

    pipeline: int = 1
    """Groups of ranks that hold consecutive layers."""
    replicate: int = 1
    """Copies of the sharded parameters."""
    shard: int = 1
    """Ranks that share parameters, gradients and states, and read different samples."""
    context: int = 1
    """Ranks that share the tokens of the same samples."""
    tensor: int = 1
    """Ranks that share every matrix."""

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return math.prod(self)

    @property
    def data_parallel(self) -> int:
        """Number of ranks, or groups of them, that read different samples."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self._asdict().items() if size > 1) or "one rank"


AXES = Layout._fields
"""Names of the mesh axes, outermost first."""


def plan_layout(config: ParallelConfig, world_size: int) -> Layout:
    """Return the axes for ``world_size`` ranks; ``parallel.shard: auto`` takes the ranks that the others leave.

    Raises:
        UserError: the product cannot be the number of ranks.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if config.shard != "auto":
        layout = Layout(**sizes)
        if layout.world_size != world_size:
            raise UserError(
                f"{_product(sizes)} = {layout.world_size} ranks, but the run has {world_size}; start that many ranks "
                "or set parallel.shard to auto"
            )
        return layout
    del sizes["shard"]
    others = math.prod(sizes.values())
    if world_size % others:
        named = f"{_product(sizes)} = {others}" if sum(size > 1 for size in sizes.values()) > 1 else _product(sizes)
        raise UserError(
            f"{named} does not divide the {world_size} ranks of this run; use a divisor of {world_size}, or start a "
            f"multiple of {others} ranks"
        )
    return Layout(**sizes, shard=world_size // others)


def _product(sizes: dict[str, int]) -> str:
    shown = {axis: size for axis, size in sizes.items() if size > 1 or axis in ("replicate", "shard")}
    if "shard" not in sizes and len(shown) > 1 and shown["replicate"] == 1:
        del shown["replicate"]
    return " x ".join(f"parallel.{axis} {size}" for axis, size in shown.items())


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the mesh, and the process groups of the axes."""

    layout: Layout
    place: Layout
    """This rank's index on each axis."""
    devices: DeviceMesh
    """Axes ``pipeline``, ``replicate``, ``shard`` and ``tensor``. Here ``shard`` is shard x context: ranks with
    different tokens of one sample share parameters like ranks with different samples."""
    context_group: dist.ProcessGroup | None
    """The ranks with the other tokens of the same samples; None if each rank holds all tokens."""
    ends_group: dist.ProcessGroup | None
    """This rank and its counterpart, if one holds the first layers of the pipeline and the other the last."""

    @property
    def fsdp(self) -> DeviceMesh:
        """The axes over which parameters are sharded, and copied if there are copies."""
        return self.devices["replicate", "shard"] if self.layout.replicate > 1 else self.devices["shard"]

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different samples."""
        return self.place.replicate * self.layout.shard + self.place.shard

    @property
    def speaks_for_samples(self) -> bool:
        """True on one of the ranks that read the same samples, so that counts include each sample once."""
        return self.place.pipeline == self.place.context == self.place.tensor == 0


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Return the mesh of this run; needs the process group of ``layout.world_size`` ranks, and every rank calls
    this.
    """
    pipeline, replicate, shard, context, tensor = layout
    devices = init_device_mesh(
        device_type,
        (pipeline, replicate, shard * context, tensor),
        mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
    )
    ranks = torch.arange(layout.world_size).view(layout)
    place = (ranks == dist.get_rank()).nonzero()[0].tolist()
    return Mesh(
        layout,
        Layout(*place),
        devices,
        _group(ranks.movedim(AXES.index("context"), -1).reshape(-1, context)) if context > 1 else None,
        _group(ranks[[0, -1]].flatten(1).T) if pipeline > 1 else None,
    )


def _group(members: Iterable[torch.Tensor]) -> dist.ProcessGroup | None:
    """Return this rank's group among several; None if it is in none of them. Every rank calls this with all groups."""
    mine = None
    for ranks in members:
        group = dist.new_group(ranks.tolist())
        if dist.get_rank() in ranks:
            mine = group
    return mine
