"""The device mesh: which ranks hold copies and which hold shards."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import ParallelConfig
from ..errors import UserError

AXES = ("replicate", "shard")
"""Names of the mesh axes, outermost first."""


def mesh_shape(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Sizes of the axes ``(replicate, shard)`` on ``world_size`` ranks.

    Raises:
        UserError: the product cannot be the number of ranks.
    """
    if config.shard == "auto":
        if world_size % config.replicate:
            raise UserError(
                f"parallel.replicate {config.replicate} does not divide the {world_size} ranks of this run; use a "
                f"divisor of {world_size}"
            )
        return config.replicate, world_size // config.replicate
    if config.replicate * config.shard != world_size:
        raise UserError(
            f"parallel.replicate {config.replicate} x parallel.shard {config.shard} = "
            f"{config.replicate * config.shard} ranks, but the run has {world_size}; start that many ranks or set "
            "parallel.shard to auto"
        )
    return config.replicate, config.shard


def build_mesh(shape: tuple[int, int], device_type: str) -> DeviceMesh:
    """The mesh of shape ``(replicate, shard)``; needs the process group."""
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)
