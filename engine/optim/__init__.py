"""AdamW with decay and no-decay groups, its states' dtype, and clipping of the global gradient norm."""

from __future__ import annotations

import torch
from torch import nn

from ..config import OptimizerConfig
from ..dtypes import DTYPES
from .adamw import CompactAdamW
from .clipping import clip_grad_norm

__all__ = ["allocate_states", "build_optimizer", "clip_grad_norm", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101); vectors (norms, biases) do not decay.

    Args:
        model: of fp32 or bf16 parameters.
        config: rates and decays.
        seed: of the stochastic rounding, where weights or states are bf16.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    if {DTYPES[config.state_dtype], *(parameter.dtype for parameter in parameters)} == {torch.float32}:
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.eps, fused=True)
    return CompactAdamW(groups, DTYPES[config.state_dtype], seed, lr=rate, betas=betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use ``value`` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state tensors, so that a checkpoint can be read into them.

    A step with zero gradients and zero learning rate changes no parameter; the states it makes are overwritten.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
