"""Compute linear layers with the same input by one matrix product: queries, keys and values; gate and up.

The weights of such layers become views of one matrix, so parameters, checkpoints and optimizers do not change. Only the
blocks' products do, while the matrix is shown to the modules. A wider product uses a GPU better, above all where keys
and values have few heads.

The layers must be whole and on this rank: FSDP gathers each parameter separately, and tensor parallelism and float8
replace the linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..config.settings import RunConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.language_model import LanguageModel, SameInput


def check(config: RunConfig, architecture: Architecture, has_one_rank: bool) -> None:
    """Refuse ``training.fuse_projections`` where the layers are not whole and on this rank.

    Args:
        config: of the run.
        architecture: of the model.
        has_one_rank: parameters are neither sharded nor copied over ranks.

    Raises:
        UserError: names the other setting.
    """
    if not config.training.fuse_projections:
        return
    parallel = config.parallel
    obstacles = {
        "several data-parallel ranks": not has_one_rank,
        f"parallel.tensor {parallel.tensor}": parallel.tensor > 1,
        f"parallel.pipeline {parallel.pipeline}": parallel.pipeline > 1,
        "parallel.cpu_offload": parallel.cpu_offload,
        "training.float8": config.training.float8,
        "adapter.kind lora": config.adapter.kind is not None,
        f"model_type {architecture.model_type}, which transformers computes": architecture.implementation != "native",
    }
    found = next((name for name, is_obstacle in obstacles.items() if is_obstacle), None)
    if found is not None:
        raise UserError(f"training.fuse_projections is true, which does not work with {found}; set it to false")


@dataclass(frozen=True)
class FusedParameter:
    """A matrix or bias vector whose consecutive rows are the parameters of several linear layers."""

    whole: nn.Parameter
    parts: list[nn.Parameter]

    @classmethod
    def of(cls, parts: list[nn.Parameter]) -> FusedParameter:
        """Move ``parts``, which keep their values, into one matrix."""
        whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, _rows(whole, parts), strict=True):
            part.data = rows
        return cls(nn.Parameter(whole, requires_grad=parts[0].requires_grad), parts)

    def hand_out_gradient(self) -> None:
        """Give each part its rows of the gradient, without copying, and take it from the whole."""
        if self.whole.grad is None:
            return
        for part, rows in zip(self.parts, _rows(self.whole.grad, self.parts), strict=True):
            if part.grad is None:
                part.grad_dtype = None  # of any dtype: that of accumulated gradients may differ
                part.grad = rows
            else:
                part.grad += rows
        self.whole.grad = None


def _rows(whole: Tensor, parts: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return whole.split([len(part) for part in parts])


@dataclass(frozen=True)
class FusedLayers:
    """The linear layers of one module that one product computes."""

    module: SameInput
    weight: FusedParameter
    bias: FusedParameter | None

    @property
    def parameters(self) -> list[FusedParameter]:
        """Return the weight and, if any, the bias."""
        return [self.weight, *([] if self.bias is None else [self.bias])]

    def show(self, weight: nn.Parameter | None, bias: nn.Parameter | None = None) -> None:
        """Let the module compute with these, or with its layers if they are None."""
        self.module.fused_weight, self.module.fused_bias = weight, bias


def fuse(model: LanguageModel) -> list[FusedLayers]:
    """Move the weights of layers with the same input into one matrix each; the model is materialized."""
    fused = []
    for module in model.modules():
        if not isinstance(module, SameInput) or len(module.layers_with_same_input) < 2:
            continue
        layers = module.layers_with_same_input
        weights = cast("list[nn.Parameter]", [layer.weight for layer in layers])
        biases = cast("list[nn.Parameter]", [layer.bias for layer in layers if layer.bias is not None])
        assert len(biases) in (0, len(layers))
        fused.append(FusedLayers(module, FusedParameter.of(weights), FusedParameter.of(biases) if biases else None))
    return fused
