"""Build AdamW with decay and no-decay groups, and clip the global gradient norm in its update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config.settings import OptimizerConfig
from ..model.dtypes import DTYPES
from .adamw import CompactAdamW
from .average import WeightAverage, build_average
from .clipping import clip_divisor, global_norm
from .fused_adamw import FusedAdamW

__all__ = [
    "allocate_states",
    "average_of",
    "build_average",
    "build_optimizer",
    "clip_divisor",
    "global_norm",
    "keep_average",
    "set_learning_rate",
    "step_unless",
]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    seed: int = 0,
    compact: type[CompactAdamW] = CompactAdamW,
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101); vectors (norms, biases) do not
    decay.

    Args:
        named_parameters: of fp32 or bf16; their names determine their random streams.
        config: rates and decays.
        seed: of the stochastic rounding, if weights or states are bf16.
        compact: class of the optimizer for these.
    """
    parameters = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # A pipeline stage may have no parameters of one kind.
    groups = [group for group in groups if group["params"]]
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    if {DTYPES[config.state_dtype], *(parameter.dtype for _, parameter in parameters)} == {torch.float32}:
        return FusedAdamW(groups, lr=rate, betas=betas, eps=config.eps)
    return compact(groups, DTYPES[config.state_dtype], seed, lr=rate, betas=betas, eps=config.eps)


def average_of(optimizer: torch.optim.Optimizer) -> WeightAverage | None:
    """Return the average of the weights that ``optimizer`` keeps up to date; None without one."""
    return optimizer.average if isinstance(optimizer, FusedAdamW | CompactAdamW) else None


def keep_average(optimizer: torch.optim.Optimizer, average: WeightAverage | None) -> None:
    """Let every step of ``optimizer`` update ``average``, of its parameters."""
    assert isinstance(optimizer, FusedAdamW | CompactAdamW)
    optimizer.average = average


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use ``value`` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None = None, step: int = 0) -> None:
    """Update the weights, or leave them and both moments bitwise unchanged, without a host sync for device tensors.

    Args:
        optimizer: of :func:`build_optimizer`.
        skip: [] fp32 on the device, 1 to leave out the update, else 0.
        divisor: [] fp32 of all gradients; None: one.
        step: number of the step of the run, of which the random rounding of the average is a function.
    """
    assert isinstance(optimizer, FusedAdamW | CompactAdamW)
    # Waits for parameters on the host only: a copy that does not might be read too early.
    home = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = skip.to(home)
    optimizer.grad_scale = None if divisor is None else divisor.to(home)
    optimizer.step()
    if optimizer.average is not None:
        optimizer.average.update(optimizer.found_inf, step)


@torch.no_grad()
def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state tensors of the parameters that have none, with zeros, as before their first step.

    A step with zero gradients and zero learning rate changes no parameter, and leaves both moments at zero. No
    parameter may have a gradient.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [parameter for parameter in parameters if parameter not in optimizer.state]
    if not missing:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.0)
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in missing:
        optimizer.state[parameter]["step"].zero_()
