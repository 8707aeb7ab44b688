"""Adapters: give linear layers trainable matrices of low rank, and keep the rest of the model as it is.

The weights of the base do not change, so they are held in the compute dtype: they need no fp32 copy. The adapter, and
the parameters of the base that train alongside, are held in ``training.weight_dtype``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ..config.packages import require_quantization
from ..config.settings import AdapterConfig, RunConfig, to_dict
from ..errors import UserError
from ..model.adapters import MAGNITUDE, AdapterParameters, adapter_parameters
from ..model.architecture import Architecture
from ..model.dtypes import DTYPES
from ..model.experts import Experts, GroupedLinear
from ..model.implementations import meta_model
from ..model.language_model import LanguageModel
from ..model.lora import LoraLinear, TokenDropout, TokenNumbers
from ..model.lora_experts import LoraGroupedLinear, RowDropout, RowNumbers
from ..model.quantized import hold_quantized, quantized_bytes
from . import pipeline


def check(architecture: Architecture, config: RunConfig, world_size: int) -> None:
    """Refuse patterns that match nothing, layouts in which some rank would have no trainable parameters, and a
    quantized base where it is not implemented.

    Raises:
        UserError: names the setting.
    """
    if config.adapter.kind is None:
        return
    parameters, parallel = adapter_parameters(architecture, config.adapter), config.parallel
    if config.training.float8:
        raise UserError(
            "training.float8 is true with adapter.kind lora: products in float8 are not implemented for adapters; set "
            "training.float8 to false"
        )
    _check_quantized(config, world_size)
    stacks = [name for name, linear in parameters.modules.items() if linear.num_experts is not None]
    if config.adapter.dropout and parallel.expert > 1 and stacks:
        raise UserError(
            f"adapter.dropout is {config.adapter.dropout:g}, but parallel.expert is {parallel.expert}, and a rank does "
            f"not know which tokens of other ranks the experts of {stacks[0]} compute; set one of them back, or leave "
            "the experts out of adapter.targets"
        )
    if parallel.pipeline == 1:
        return
    if parallel.pipeline_schedule.endswith("zero_bubble"):
        raise UserError(
            f"adapter.kind is lora, but parallel.pipeline_schedule {parallel.pipeline_schedule} computes the gradients "
            "of all weights, and those of the base are frozen; use 1f1b or interleaved_1f1b"
        )
    stages = pipeline.cut_layers(architecture, parallel.pipeline * parallel.pipeline_stages_per_rank)
    for number, layers in enumerate(stages):
        here = {name for name, _ in meta_model(architecture, layers).named_parameters()}
        if here.isdisjoint(parameters.saved) and here.isdisjoint(f"{module}.weight" for module in parameters.modules):
            raise UserError(
                f"adapter.targets leave stage {number} of parallel.pipeline {parallel.pipeline} without trained "
                f"parameters (layers {layers.start} to {layers.stop - 1}); add its layers, or use other axes"
            )


def _check_quantized(config: RunConfig, world_size: int) -> None:
    kind, offload = config.adapter.quantize_base, config.parallel.cpu_offload
    if kind == "none":
        return
    require_quantization(config.adapter)
    if world_size > 1:
        raise UserError(
            f"adapter.quantize_base is {kind} on {world_size} ranks, but a quantized matrix is not divided over ranks; "
            "use one rank, or set it to none and share the base by parallel.shard"
        )
    if offload:
        raise UserError(
            f"adapter.quantize_base is {kind}, but parallel.cpu_offload is {_shown(offload)}, and a quantized base "
            "stays on the device; set one of them back"
        )


def base_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Return the bytes of the weights of the base as they are held: in the compute dtype, or quantized."""
    itemsize, kind = DTYPES[config.training.precision].itemsize, config.adapter.quantize_base
    if kind == "none":
        return architecture.num_parameters * itemsize
    modules = adapter_parameters(architecture, config.adapter).modules.values()
    sizes = [(m.out_features, m.in_features) for m in modules if m.num_experts is None]
    elements = sum(out_features * in_features for out_features, in_features in sizes)
    return (architecture.num_parameters - elements) * itemsize + sum(quantized_bytes(kind, *size) for size in sizes)


def apply(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Give ``model`` (on the meta device) the configured adapter; call after tensor parallelism, before sharding.

    Args:
        model: the whole, or the layers of a stage.
        config: of the run.
        device: that computes.
    """
    if config.adapter.kind is None:
        return
    parameters = adapter_parameters(model.architecture, config.adapter)
    compute_dtype = DTYPES[config.training.precision]
    _attach(model, parameters, config.seed, device, compute_dtype)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            # What never learns keeps its dtype, as a bias of routers does.
            if full_name in parameters.frozen and parameter.requires_grad and full_name not in model.constants:
                module.register_parameter(name, nn.Parameter(parameter.to(compute_dtype), requires_grad=False))
    model.base_names = frozenset(parameters.frozen)


def _attach(
    model: LanguageModel, parameters: AdapterParameters, seed: int, device: torch.device, compute_dtype: torch.dtype
) -> None:
    config, names = parameters.config, {module: name for name, module in model.named_modules()}
    for block in model.blocks:
        numbers = TokenNumbers()
        found = [(module, names[module]) for module in block.modules() if names[module] in parameters.modules]
        for module, name in found:
            if isinstance(module, GroupedLinear):
                continue
            assert isinstance(module, nn.Linear)
            size = parameters.modules[name].in_features
            dropout = TokenDropout(config.dropout, numbers, seed, name, size, device) if config.dropout else None
            adapted = LoraLinear.attach(module, config.rank, parameters.scaling, config.dora, dropout)
            _split_like_base(adapted)
            if config.quantize_base != "none":
                hold_quantized(adapted, config.quantize_base, compute_dtype)
        for experts in (module for module in block.modules() if isinstance(module, Experts)):
            _attach_to_experts(experts, names, parameters, numbers, seed, device)
        if found and config.dropout:
            model.before_block(block, numbers.see)


def _attach_to_experts(
    experts: Experts,
    names: Mapping[nn.Module, str],
    parameters: AdapterParameters,
    tokens: TokenNumbers,
    seed: int,
    device: torch.device,
) -> None:
    config, rows = parameters.config, RowNumbers(tokens, experts.num_experts)
    for module in experts.children():
        name = names[module]
        if name not in parameters.modules:
            continue
        assert isinstance(module, GroupedLinear)
        dropout = None
        if config.dropout:
            dropout = RowDropout(config.dropout, rows, seed, name, parameters.modules[name].in_features, device)
            experts.see_rows = rows.see
        _split_like_base(LoraGroupedLinear.attach(module, config.rank, parameters.scaling, dropout))


def _split_like_base(linear: LoraLinear | LoraGroupedLinear) -> None:
    """Divide the adapter over the ranks that share the matrix of its layer: A by inputs, or B by outputs, and the
    adapters of experts also by experts.
    """
    weight = linear.weight
    if not isinstance(weight, DTensor):
        return
    rows, columns = Shard(weight.ndim - 2), Shard(weight.ndim - 1)
    without_rows = [Replicate() if place == rows else place for place in weight.placements]
    without_columns = [Replicate() if place == columns else place for place in weight.placements]
    parameters: list[tuple[nn.Module, str, list[Placement]]] = [
        (linear.lora_A, "weight", without_rows),
        (linear.lora_B, "weight", without_columns),
        (linear, MAGNITUDE, without_columns),
    ]
    for module, name, placements in parameters:
        parameter: Tensor | None = getattr(module, name, None)
        if parameter is not None:
            part = distribute_tensor(parameter, weight.device_mesh, placements, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part))


_MEANING = ("kind", "rank", "alpha", "targets", "rslora", "dora", "modules_to_save", "quantize_base")
"""Settings that determine which parameters a checkpoint holds, and what they compute."""


def require_same(former: Mapping[str, Any], config: AdapterConfig, folder: str | Path) -> None:
    """Refuse to continue from a checkpoint with another adapter.

    Args:
        former: configuration of the run that wrote the checkpoint ``folder``, as a nested dictionary.

    Raises:
        UserError: with both values.
    """
    default = to_dict(AdapterConfig())
    here, there = to_dict(config), {**default, **former.get("adapter", {})}
    if there["kind"] is None and config.kind is not None:
        raise UserError(
            f"adapter.kind is {config.kind}, but {folder} was trained without an adapter; set it back to null, or "
            f"start a new run_folder with model.initialize_from {folder}"
        )
    for key in _MEANING:
        if here[key] != there[key]:
            raise UserError(
                f"adapter.{key} is {_shown(here[key])}, but {folder} was trained with {_shown(there[key])} and holds "
                "the parameters of that adapter; set it back, or start a new run_folder"
            )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
