"""Build the optimizer of a run, and step it: :func:`build_optimizer` is the one place that composes its parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.settings import OptimizerConfig
from ..model.dtypes import DTYPES
from .adamw import CompactAdamW
from .adamw_8bit import AdamW8bit
from .average import WeightAverage, build_average
from .base import CombinedOptimizer, TrainingOptimizer
from .child_tuning import ChildTuning
from .clipping import clip_divisor, global_norm
from .elementwise import ElementwiseOptimizer
from .fused_adamw import FusedAdamW
from .groups import has_8bit_states, is_muons, parameter_groups
from .imported import build_imported
from .lion import Lion
from .muon import Muon

__all__ = [
    "TrainingOptimizer",
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

Adapt = Callable[[type[Any]], type[Any]]
"""Replaces a class of optimizers that are not PyTorch's; a dry run has its own."""


class _Ingredients(NamedTuple):
    """What every optimizer is made of."""

    parameters: list[tuple[str, nn.Parameter]]
    config: OptimizerConfig
    seed: int
    tables: Collection[str]
    adapt: Adapt


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    seed: int = 0,
    tables: Collection[str] = (),
    adapt: Adapt = lambda kind: kind,
) -> TrainingOptimizer:
    """Return the optimizer ``optimizer.name`` of the parameters that are trained.

    Args:
        named_parameters: of fp32 or bf16; their names determine their groups and their random streams.
        config: of the run.
        seed: of the stochastic rounding, if weights or states are bf16, and of child-tuning.
        tables: names of embeddings and heads, which Muon leaves to AdamW.
        adapt: see :data:`Adapt`.

    Raises:
        UserError: the class that ``optimizer.name`` imports cannot be used.
    """
    parameters = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    build = _BUILDERS.get(config.name, _imported)
    optimizer = build(_Ingredients(parameters, config, seed, tables, adapt))
    if config.child_tuning is not None:
        optimizer.child_tuning = ChildTuning(config.child_tuning, seed)
    return optimizer


def _adamw(given: _Ingredients) -> TrainingOptimizer:
    """Return AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101): PyTorch's fused one for fp32."""
    config, groups, settings = given.config, parameter_groups(given.parameters, given.config), _of_adamw(given.config)
    state_dtype = DTYPES[config.state_dtype]
    if {state_dtype, *(parameter.dtype for _, parameter in given.parameters)} == {torch.float32}:
        return FusedAdamW(groups, **settings)
    optimizer: ElementwiseOptimizer = given.adapt(CompactAdamW)(groups, state_dtype, given.seed, **settings)
    return optimizer


def _of_adamw(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}


def _adamw_8bit(given: _Ingredients) -> TrainingOptimizer:
    """Return AdamW with 8-bit states of matrices, combined with AdamW of the rest."""
    coded = [named for named in given.parameters if has_8bit_states(named[1].shape)]
    rest = [named for named in given.parameters if not has_8bit_states(named[1].shape)]
    parts: list[TrainingOptimizer] = []
    if coded:
        groups = parameter_groups(coded, given.config)
        parts.append(given.adapt(AdamW8bit)(groups, given.seed, **_of_adamw(given.config)))
    if rest:
        parts.append(_adamw(given._replace(parameters=rest)))
    return CombinedOptimizer(parts)


def _lion(given: _Ingredients) -> TrainingOptimizer:
    config, betas = given.config, (given.config.lion.beta1, given.config.lion.beta2)
    groups = parameter_groups(given.parameters, config)
    optimizer: TrainingOptimizer = given.adapt(Lion)(
        groups, DTYPES[config.state_dtype], given.seed, lr=config.learning_rate, betas=betas
    )
    return optimizer


def _muon(given: _Ingredients) -> TrainingOptimizer:
    """Return Muon of the matrices of the blocks, combined with AdamW of the rest."""
    config, options = given.config, given.config.muon
    mine = [named for named in given.parameters if is_muons(named[0], named[1].ndim, config, given.tables)]
    names = {name for name, _ in mine}
    parts: list[TrainingOptimizer] = []
    if mine:
        dtype = options.newton_schulz_dtype
        if dtype == "auto":
            dtype = "bf16" if _computed_on(mine[0][1]) == "cuda" else "fp32"
        parts.append(
            given.adapt(Muon)(
                parameter_groups(mine, config),
                DTYPES[config.state_dtype],
                given.seed,
                dtype=DTYPES[dtype],
                num_steps=options.newton_schulz_steps,
                scale=options.scale,
                nesterov=options.nesterov,
                lr=config.learning_rate,
                momentum=options.momentum,
            )
        )
    rest = [named for named in given.parameters if named[0] not in names]
    if rest:
        parts.append(_adamw(given._replace(parameters=rest)))
    return CombinedOptimizer(parts)


def _imported(given: _Ingredients) -> TrainingOptimizer:
    return build_imported(parameter_groups(given.parameters, given.config), given.config, given.adapt)


_BUILDERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit, "lion": _lion, "muon": _muon}


def _computed_on(parameter: Tensor) -> str:
    """Return the type of the device that computes with ``parameter``, which may be in host memory."""
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.device.type if mesh is None else mesh.device_type


def average_of(optimizer: TrainingOptimizer) -> WeightAverage | None:
    """Return the average of the weights that ``optimizer`` keeps up to date; None without one."""
    return optimizer.average


def keep_average(optimizer: TrainingOptimizer, average: WeightAverage | None) -> None:
    """Let every step of ``optimizer`` update ``average``, of its parameters."""
    optimizer.average = average


def set_learning_rate(optimizer: TrainingOptimizer, value: float) -> None:
    """Use ``value`` in every parameter group, times the ``lr_scale`` of the group."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]


def step_unless(optimizer: TrainingOptimizer, skip: Tensor, divisor: Tensor | None = None, step: int = 0) -> None:
    """Update the weights, or leave them and all states bitwise unchanged.

    There is no host sync for device tensors, except by the optimizers that say so. Some optimizers count skipped steps
    in the state ``step``.

    Args:
        optimizer: of :func:`build_optimizer`.
        skip: [] fp32 on the device, 1 to leave out the update, else 0.
        divisor: [] fp32 of all gradients; None: one.
        step: number of the step of the run, of which the mask of child-tuning and the random rounding of the
            average are functions.
    """
    # Waits for parameters on the host only: a copy that does not might be read too early.
    home = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = skip.to(home)
    optimizer.grad_scale = None if divisor is None else divisor.to(home)
    if optimizer.child_tuning is not None:
        optimizer.child_tuning.mask_(((name, parameter) for name, _, parameter in optimizer.named()), step)
        kept = torch.full((), optimizer.child_tuning.probability, device=home)
        optimizer.grad_scale = kept if optimizer.grad_scale is None else optimizer.grad_scale * kept
    optimizer.step()
    if optimizer.average is not None:
        optimizer.average.update(optimizer.found_inf, step)


def allocate_states(optimizer: TrainingOptimizer) -> None:
    """Allocate the state tensors of the parameters that have none, as before their first step.

    No parameter may have a gradient.
    """
    optimizer.allocate()
