"""Data parallelism: what the ranks that compute the same layers on different tokens do to parameters and gradients.

Two implementations exist. :mod:`.fsdp` shards everything over several ranks, or keeps it in host memory.
:mod:`.unsharded` is for one rank, which needs no exchange, and so none of the copies that FSDP makes for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..config.settings import ParallelConfig
from ..model.language_model import LanguageModel
from .fsdp import FullySharded
from .host_transfers import HostTransfers
from .mesh import Mesh
from .unsharded import Unsharded


class DataParallel(Protocol):
    """The parameters and gradients of one model on this rank."""

    def on_materialized(self, accumulates: bool) -> None:
        """Prepare the parameters, which now have memory.

        Args:
            accumulates: whether a step adds the gradients of several micro-batches, which must then be fp32.
        """

    def computing(self) -> AbstractContextManager[None]:
        """Return the scope of the passes of a step or of an evaluation.

        Inside, the names of parameters may show other tensors in the compute dtype. Outside, they show the parameters
        that optimizers and checkpoints need, and gradients are complete.
        """

    def reduce_gradients(self, now: bool) -> None:
        """Set whether the next backward pass sums gradients over ranks, or only over micro-batches (in fp32)."""

    def collect_gradients(self) -> None:
        """Take the gradients that were assigned to parameters without autograd's hooks, in the scope."""


def wrap(
    model: LanguageModel,
    mesh: Mesh,
    config: ParallelConfig,
    compute_dtype: torch.dtype,
    fuse_projections: bool = False,
) -> DataParallel:
    """Prepare ``model``, on the meta device, for data parallelism.

    Args:
        model: all other techniques are applied.
        mesh: of all ranks.
        config: of the run.
        compute_dtype: of activations and of the parameters in matrix products.
        fuse_projections: see :mod:`.fused_projections`; only on one rank.
    """
    if is_alone(mesh.fsdp, config):
        transfers = HostTransfers(torch.device(mesh.devices.device_type)) if config.cpu_offload == "optimizer" else None
        return Unsharded(model, compute_dtype, fuse_projections, transfers)
    return FullySharded(model, mesh, config, compute_dtype)


def is_alone(mesh: DeviceMesh, config: ParallelConfig) -> bool:
    """Return whether this rank shares parameters with no other, and computes with parameters that stay on its
    device.
    """
    return mesh.size() == 1 and config.cpu_offload is not True


def copy_full_(parameter: Tensor, values: Tensor) -> None:
    """Write the whole tensor ``values``, the same on every rank, into a parameter: each rank takes its part."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
        return
    # Not distribute_tensor, which does not support rows that two axes shard one after the other.
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    mine = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    parameter.to_local().copy_(values[mine])
