"""Lay out the ranks of a run on the axes of a device mesh."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .layout import AXES, Layout


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the mesh, and the process groups of the axes."""

    layout: Layout
    coordinate: Layout
    """This rank's index on each axis."""
    devices: DeviceMesh
    """Axes ``pipeline``, ``replicate``, ``shard`` and ``tensor``. Here ``shard`` is shard x context: ranks with
    different tokens of one sample share parameters like ranks with different samples."""
    context_group: dist.ProcessGroup | None
    """The ranks with the other tokens of the same samples; None if each rank holds all tokens."""
    embedding_group: dist.ProcessGroup | None
    """This rank and its counterpart, if one holds the first layers of the pipeline and the other the last."""
    experts: DeviceMesh | None = None
    """The same ranks on the axes ``pipeline``, ``replicate``, ``expert_shard``, ``expert`` and ``tensor``; None if no
    ranks share experts. The ranks of ``shard`` are expert_shard x expert: neighbours have different experts."""

    @property
    def fsdp(self) -> DeviceMesh:
        """The axes over which parameters are sharded, and copied if there are copies."""
        return self.devices["replicate", "shard"] if self.layout.replicate > 1 else self.devices["shard"]

    @property
    def fsdp_of_experts(self) -> DeviceMesh | None:
        """The axes over which the parameters of a rank's experts are sharded and copied; None: those of the others."""
        if self.experts is None:
            return None
        return self.experts["replicate", "expert_shard"] if self.layout.replicate > 1 else self.experts["expert_shard"]

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different samples."""
        return self.coordinate.replicate * self.layout.shard + self.coordinate.shard

    @property
    def counts_samples(self) -> bool:
        """True on one of the ranks that read the same samples, so that counts include each sample once."""
        return self.coordinate.pipeline == self.coordinate.context == self.coordinate.tensor == 0

    def __str__(self) -> str:
        experts = "" if self.experts is None else f" (experts over {self.experts.size(3)} of shard x context)"
        return f"{self.layout}{experts}"


def build_mesh(layout: Layout, device_type: str, expert: int = 1) -> Mesh:
    """Return the mesh of this run; needs the process group of ``layout.world_size`` ranks, and every rank calls
    this.

    Args:
        layout: of the ranks.
        device_type: of their devices.
        expert: number of ranks that share experts, a divisor of shard x context.
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
        _divided(devices, shard * context // expert, expert) if expert > 1 else None,
    )


def _divided(devices: DeviceMesh, expert_shard: int, expert: int) -> DeviceMesh:
    """Return the same mesh with two axes instead of ``shard``. The groups of the other axes are not created again.

    A second mesh of :func:`init_device_mesh` would have the same ranks, but other groups.
    """
    return devices._unflatten("shard", (expert_shard, expert), ("expert_shard", "expert"))


def _group(members: Iterable[torch.Tensor]) -> dist.ProcessGroup | None:
    """Return this rank's group among several; None if it is in none of them. Every rank calls this with all groups."""
    mine = None
    for ranks in members:
        group = dist.new_group(ranks.tolist())
        if dist.get_rank() in ranks:
            mine = group
    return mine
