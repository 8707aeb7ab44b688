"""A model for this run's ranks: every transformation in its place, one after another."""

from __future__ import annotations

import torch

from ..config import RunConfig
from ..dtypes import DTYPES
from ..model.architecture import Architecture
from ..model.decoder import Decoder, elementwise_implementation
from . import compile as block_compile
from . import float8, fsdp, recompute
from .mesh import build_mesh, mesh_shape
from .process_group import Ranks


def build_model(
    config: RunConfig, architecture: Architecture, ranks: Ranks, compiled: bool, num_micro_batches: int
) -> Decoder:
    """Meta device -> float8 -> recompute -> compile -> shard -> materialize; weights come afterwards.

    Args:
        compiled: whether blocks are compiled; see :func:`retemper.engine.parallel.compile.wanted`.
        num_micro_batches: of a step on this rank.

    Raises:
        UserError: an implementation is asked for that cannot run here.
    """
    training, parallel = config.training, config.parallel
    mesh = build_mesh(mesh_shape(parallel, ranks.world_size), ranks.device.type)
    elementwise = ranks.everywhere(lambda: elementwise_implementation(training.fused_elementwise, ranks.device.type))
    with torch.device("meta"):
        model = Decoder(architecture, elementwise).to(DTYPES[training.weight_dtype])
    float8.apply(model, training, ranks.device)
    recompute.apply(model, parallel)
    if compiled:
        block_compile.apply(model)
    fsdp.apply(model, mesh, parallel, DTYPES[training.precision])
    model.to_empty(device=ranks.device)
    if training.weight_dtype != "fp32" and num_micro_batches > 1:
        fsdp.accumulate_in_fp32(model)
    return model
