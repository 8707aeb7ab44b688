"""Compute the number of ranks on each mesh axis from the configuration, before any rank is contacted."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..config.settings import ParallelConfig, RunConfig
from ..errors import UserError
from ..schedule import plan_batches


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
        UserError: the product cannot be the number of ranks, or ``parallel.expert`` does not divide the ranks of
            ``shard`` x ``context``.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if config.shard == "auto":
        sizes["shard"] = _shard_of(sizes, world_size)
    layout = Layout(**sizes)
    if layout.world_size != world_size:
        raise UserError(
            f"{_product(sizes)} = {layout.world_size} ranks, but the run has {world_size}; start that many ranks or "
            "set parallel.shard to auto"
        )
    ranks = layout.shard * layout.context
    if ranks % config.expert:
        raise UserError(
            f"parallel.expert {config.expert} does not divide parallel.shard {layout.shard} x parallel.context "
            f"{layout.context} = {ranks} ranks; use a divisor of {ranks}"
        )
    return layout


def _shard_of(sizes: dict[str, int], world_size: int) -> int:
    """Return the number of ranks that the axes other than ``shard`` leave."""
    sizes = {axis: size for axis, size in sizes.items() if axis != "shard"}
    others = math.prod(sizes.values())
    if world_size % others:
        named = f"{_product(sizes)} = {others}" if sum(size > 1 for size in sizes.values()) > 1 else _product(sizes)
        raise UserError(
            f"{named} does not divide the {world_size} ranks of this run; use a divisor of {world_size}, or start a "
            f"multiple of {others} ranks"
        )
    return world_size // others


def _product(sizes: dict[str, int]) -> str:
    shown = {axis: size for axis, size in sizes.items() if size > 1 or axis in ("replicate", "shard")}
    if "shard" not in sizes and len(shown) > 1 and shown["replicate"] == 1:
        del shown["replicate"]
    return " x ".join(f"parallel.{axis} {size}" for axis, size in shown.items())


def check_layout(config: RunConfig, world_size: int) -> None:
    """Refuse settings that do not fit the number of ranks, before any rank waits for another.

    Raises:
        UserError: the mesh or the global batch cannot be divided among the ranks.
    """
    layout = plan_layout(config.parallel, world_size)
    plan_batches(config.training, layout.data_parallel)
