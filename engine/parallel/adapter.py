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

from ..config.settings import AdapterConfig, RunConfig, to_dict
from ..errors import UserError
from ..model.adapters import AdapterParameters, adapter_parameters
from ..model.architecture import Architecture
from ..model.dtypes import DTYPES
from ..model.implementations import meta_model
from ..model.language_model import LanguageModel
from ..model.lora import LoraLinear, TokenDropout, TokenNumbers
from . import pipeline


def check(architecture: Architecture, config: RunConfig) -> None:
    """Refuse patterns that match nothing, and layouts in which some rank would have no trainable parameters.

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
    _attach(model, parameters, config.seed, device)
    compute_dtype = DTYPES[config.training.precision]
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            if full_name in parameters.frozen and full_name not in model.constants:
                module.register_parameter(name, nn.Parameter(parameter.to(compute_dtype), requires_grad=False))
    model.base_names = frozenset(parameters.frozen)


def _attach(model: LanguageModel, parameters: AdapterParameters, seed: int, device: torch.device) -> None:
    config, names = parameters.config, {module: name for name, module in model.named_modules()}
    for block in model.blocks:
        numbers = TokenNumbers()
        found = [(module, names[module]) for module in block.modules() if names[module] in parameters.modules]
        for module, name in found:
            assert isinstance(module, nn.Linear)
            size = parameters.modules[name].in_features
            dropout = TokenDropout(config.dropout, numbers, seed, name, size, device) if config.dropout else None
            _split_like_base(LoraLinear.attach(module, config.rank, parameters.scaling, config.dora, dropout))
        if found and config.dropout:
            model.before_block(block, numbers.see)


def _split_like_base(linear: LoraLinear) -> None:
    """Divide the adapter over the ranks that share the matrix of its layer: A by inputs, or B by outputs."""
    weight = linear.weight
    if not isinstance(weight, DTensor):
        return
    (placement,) = weight.placements
    splits_rows = placement == Shard(0)
    placements = {
        "lora_A": (linear.lora_A, "weight", Replicate() if splits_rows else Shard(1)),
        "lora_B": (linear.lora_B, "weight", Shard(0) if splits_rows else Replicate()),
        "magnitude": (linear, "lora_magnitude_vector", Shard(0) if splits_rows else Replicate()),
    }
    for module, name, placed in placements.values():
        parameter: Tensor | None = getattr(module, name)
        if parameter is not None:
            part = distribute_tensor(parameter, weight.device_mesh, [placed], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part))


_MEANING = ("kind", "rank", "alpha", "targets", "rslora", "dora", "modules_to_save")
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
