"""Build the model of a run on this rank, applying all transformations in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...kernels.attention import Choice as AttentionChoice
from ..config.settings import ParallelConfig, RunConfig
from ..errors import UserError
from ..model.architecture import Architecture, LayerRange
from ..model.attention_choice import context_kind
from ..model.decoder import Decoder
from ..model.dtypes import DTYPES
from ..model.implementations import meta_model
from ..model.language_model import LanguageModel
from ..optim import groups
from . import (
    activation_offload,
    adapter,
    context,
    data_parallel,
    expert,
    float8,
    fused_projections,
    neftune,
    pipeline,
    recompute,
    router_losses,
    tensor,
    trainable,
    z_loss,
)
from . import compile as block_compile
from .data_parallel import DataParallel
from .forward_backward import BatchPreparer, ForwardBackward, ModelParts, NonPipelined
from .mesh import Mesh
from .process_group import Ranks


@dataclass(frozen=True)
class Choices:
    """Decisions that the configuration leaves open."""

    attention: AttentionChoice
    """See :func:`retemper.engine.model.attention_choice.choose_attention`."""
    compiled: bool
    """True if blocks are compiled; see :func:`retemper.engine.parallel.compile.enabled`."""
    num_micro_batches: int
    """Number of micro-batches in a step on this rank."""
    precision_reason: str = "as set"
    """The reason for the compute dtype."""
    offload_reason: str | None = None
    """The reason for ``parallel.cpu_offload``; None if it is as set."""


def check(
    config: RunConfig, architecture: Architecture, choices: Choices, device: torch.device, world_size: int
) -> None:
    """Refuse settings that are impossible with the model's shape or on this number of ranks.

    Raises:
        UserError: with both sides of the arithmetic.
    """
    parallel, training = config.parallel, config.training
    float8.enabled(training, device)
    table = architecture.position_table
    if table is not None and training.sequence_length > table:
        raise UserError(
            f"training.sequence_length {training.sequence_length:,} is longer than the model's table of {table:,} "
            f"positions; set it to {table} at most"
        )
    _check_implementation(config, architecture)
    fused_projections.check(config, architecture, world_size == parallel.tensor * parallel.pipeline)
    expert.check(architecture, parallel)
    tensor.check(architecture, config)
    context.check(architecture, parallel, training)
    pipeline.check(architecture, config, choices.num_micro_batches, choices.compiled)
    trainable.check(config, architecture)
    adapter.check(architecture, config, world_size)
    groups.check(config.optimizer, trainable.learned(architecture, config))
    _check_offload(parallel, world_size)
    activation_offload.check(config)
    tokens, ranks = training.micro_batch_size * training.sequence_length, parallel.context * parallel.tensor
    if tokens % ranks:
        raise UserError(
            f"training.micro_batch_size {training.micro_batch_size} x training.sequence_length "
            f"{training.sequence_length} = {tokens} tokens cannot be divided evenly among parallel.context "
            f"{parallel.context} x parallel.tensor {parallel.tensor} = {ranks} ranks; use multiples of {ranks}"
        )
    if parallel.async_tensor and not (parallel.tensor > 1 and choices.compiled and device.type == "cuda"):
        raise UserError(
            "parallel.async_tensor is true, but it needs parallel.tensor > 1, a GPU and compiled blocks "
            "(training.compile); set it to false"
        )


def _check_offload(parallel: ParallelConfig, world_size: int) -> None:
    if parallel.cpu_offload == "optimizer" and world_size != parallel.pipeline:
        sharing = world_size // parallel.pipeline
        raise UserError(
            f"parallel.cpu_offload is optimizer, which is for ranks that hold all parameters of their layers, but "
            f"{sharing} ranks share them; set it to true, which offloads each rank's part, or use one rank"
        )


def _check_implementation(config: RunConfig, architecture: Architecture) -> None:
    """Refuse parallelism that the implementation of the model does not support."""
    parallel = config.parallel
    native_only = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    for name, size in native_only.items():
        if size > 1 and architecture.implementation == "transformers":
            raise UserError(
                f"parallel.{name} is {size}, but model_type {architecture.model_type} is computed by "
                f"{architecture.describe_implementation()}; set it to 1 and use parallel.shard or parallel.context"
            )
    if parallel.context > 1 and not architecture.packs_documents:
        raise UserError(
            f"parallel.context is {parallel.context}, but model_type {architecture.model_type} is computed by "
            f"{architecture.describe_implementation()}: its blocks need all tokens of a document; set it to 1"
        )


Materialize = Callable[[LanguageModel, torch.device, torch.device], object]
"""Allocates the tensors of a model that is on the meta device, with the arguments of ``LanguageModel.materialize``."""


def materialize_empty(model: LanguageModel, device: torch.device, weights_device: torch.device) -> None:
    """Allocate the tensors of a model; they are not initialized."""
    model.materialize(device, weights_device)


def build_stage(
    config: RunConfig,
    architecture: Architecture,
    layers: LayerRange,
    ranks: Ranks,
    mesh: Mesh,
    choices: Choices,
    materialize: Materialize,
) -> tuple[LanguageModel, DataParallel]:
    """Build some layers of the model: meta device -> tensor -> expert -> adapter -> context -> float8 -> recompute ->
    compile -> offload -> freeze -> shard -> materialize.

    The arguments are those of :func:`build_model`; ``layers`` are those of the stage.
    """
    training, parallel = config.training, config.parallel
    model = meta_model(architecture, layers).cast_parameters(DTYPES[training.weight_dtype])
    model.z_loss = training.z_loss
    if parallel.tensor > 1:
        assert isinstance(model, Decoder)
        tensor.apply(model, mesh.devices["tensor"], parallel.async_tensor)
    expert.apply(model, mesh.experts)
    adapter.apply(model, config, ranks.device)
    context.apply(model, mesh.context_group, context_kind(parallel, architecture))
    neftune.apply(model, config, mesh)
    float8.apply(model, training, ranks.device)
    recompute.apply(model, parallel, training.fuse_projections)
    if choices.compiled:
        block_compile.apply(model)
    if parallel.offload_activations:
        activation_offload.apply(model, ranks.device)
    trainable.apply(model, training, config.adapter)
    wrapped = data_parallel.wrap(model, mesh, parallel, DTYPES[training.precision], training.fuse_projections)
    materialize(model, ranks.device, torch.device("cpu") if parallel.cpu_offload else ranks.device)
    wrapped.on_materialized(accumulates=choices.num_micro_batches > 1)
    return model, wrapped


def build_model(
    config: RunConfig,
    architecture: Architecture,
    ranks: Ranks,
    mesh: Mesh,
    choices: Choices,
    stages: list[LayerRange] | None = None,
    materialize: Materialize = materialize_empty,
) -> tuple[ModelParts, ForwardBackward]:
    """Build this rank's stages of the model, the losses of its routers, and what computes forward and backward.

    Weights are loaded afterwards.

    Args:
        config: of the run.
        architecture: the model.
        ranks: all ranks.
        mesh: this rank's place among them.
        choices: decisions that the configuration leaves open.
        stages: the layers of each stage of the pipeline; None: balanced.
        materialize: see :data:`Materialize`.

    Raises:
        UserError: a requested implementation cannot run here.
    """
    training, parallel = config.training, config.parallel
    numbers = pipeline.stage_numbers(
        parallel.pipeline_schedule, mesh.coordinate.pipeline, parallel.pipeline, parallel.pipeline_stages_per_rank
    )
    stages = stages or pipeline.cut_layers(architecture, parallel.pipeline * parallel.pipeline_stages_per_rank)

    built = [build_stage(config, architecture, stages[number], ranks, mesh, choices, materialize) for number in numbers]
    decoders, wrapped = [model for model, _ in built], [wrapped for _, wrapped in built]
    kind = context_kind(parallel, architecture)
    prepare = BatchPreparer(mesh, ranks.device, choices.attention, architecture.sliding_windows, kind)
    # With tensor parallelism all ranks have the same tokens, and their gradients are summed.
    counts = mesh.coordinate.tensor == 0
    routers = router_losses.attach(decoders, training, ranks.device, counts)
    parts = ModelParts(decoders, routers, z_loss.attach(decoders, training, ranks.device, counts))
    if parallel.pipeline > 1:
        count = choices.num_micro_batches
        dtype = DTYPES[training.precision]
        return parts, pipeline.Pipelined(decoders, wrapped, numbers, config, prepare, count, dtype)
    return parts, NonPipelined(decoders[0], wrapped[0], prepare, parallel.reduce_gradients == "micro_batch")
