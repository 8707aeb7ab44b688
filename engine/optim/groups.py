"""Divide the parameters of a run into groups with their own learning rate, weight decay and optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config.settings import OptimizerConfig, ParameterGroupConfig
from ..errors import UserError

BLOCK_SIZE = 256
"""Consecutive elements of a row that have a common scale in 8-bit states, as in torchao."""
_LEAST_8BIT = 4096
"""Number of elements of the smallest matrix with 8-bit states, as in bitsandbytes and torchao."""
Named = Sequence[tuple[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]


class Selected(NamedTuple):
    """A group of ``optimizer.groups`` and its parameters; the last one of a run is the rest, without a group."""

    group: ParameterGroupConfig | None
    parameters: Named


def patterns_of(group: ParameterGroupConfig) -> list[str]:
    """Return the patterns of a group."""
    return [group.match] if isinstance(group.match, str) else group.match


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the shell patterns matches all of ``name``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check(config: OptimizerConfig, names: Collection[str]) -> None:
    """Refuse patterns that match no parameter, and groups that match the same one.

    Args:
        config: of the run.
        names: of all trainable parameters of the whole model.

    Raises:
        UserError: names the pattern, and some parameters.
    """
    some = ", ".join(list(names)[:3])
    given = [(f"optimizer.groups[{place}].match", patterns_of(one)) for place, one in enumerate(config.groups)]
    for key, patterns in [*given, ("optimizer.muon.exclude", config.muon.exclude)]:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"{key} has {pattern!r}, which matches no trainable parameter; parameters are named {some} ..."
                )
    for name in names:
        keys = [key for key, patterns in given if matches(name, patterns)]
        if len(keys) > 1:
            raise UserError(f"{keys[0]} and {keys[1]} both match {name}; let each parameter be in one group")


def select(parameters: Named, config: OptimizerConfig) -> list[Selected]:
    """Return the parameters by group of ``optimizer.groups``; then the rest."""
    selected = [
        Selected(group, [(name, p) for name, p in parameters if matches(name, patterns_of(group))])
        for group in config.groups
    ]
    taken = {name for one in selected for name, _ in one.parameters}
    return [*selected, Selected(None, [(name, p) for name, p in parameters if name not in taken])]


def parameter_groups(parameters: Named, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: those of ``optimizer.groups``, and two for the rest.

    Vectors (norms, biases) do not decay, unless they are in a group that says so. A pipeline stage may have no
    parameters of a kind: groups without parameters are left out.
    """
    groups: list[dict[str, Any]] = []
    for group, some in select(parameters, config):
        for vectors in (False, True):
            decay = 0.0 if vectors else config.weight_decay
            scale = 1.0
            if group is not None and group.weight_decay is not None:
                decay = group.weight_decay
            if group is not None and group.learning_rate is not None:
                scale = group.learning_rate / config.learning_rate
            named = [(name, p) for name, p in some if (p.ndim < 2) == vectors]
            groups.append(
                {"params": named, "weight_decay": decay, "lr": config.learning_rate * scale, "lr_scale": scale}
            )
    return [one for one in groups if one["params"]]


def is_muons(name: str, ndim: int, config: OptimizerConfig, tables: Collection[str]) -> bool:
    """Return whether Muon updates a parameter: a matrix of the blocks, or a stack of experts.

    Args:
        name: of the parameter.
        ndim: number of its dimensions.
        config: of the run.
        tables: names of embeddings and heads.
    """
    is_matrix = ndim == 2 or (ndim == 3 and "experts" in name)  # other stacks are convolutions
    return is_matrix and name not in tables and not matches(name, config.muon.exclude)


def has_8bit_states(shape: Sequence[int]) -> bool:
    """Return whether ``adamw_8bit`` stores the states of a parameter in 8 bits: it does for matrices, or stacks of
    them, whose rows consist of whole blocks.

    Args:
        shape: of the whole parameter, so that the layout of a run makes no difference.
    """
    return len(shape) > 1 and shape[-1] % BLOCK_SIZE == 0 and math.prod(shape) >= _LEAST_8BIT


def require_same_optimizer(former: Mapping[str, Any], config: OptimizerConfig, folder: str | Path) -> None:
    """Refuse to continue from a checkpoint with the states of another optimizer.

    Args:
        former: configuration of the run that wrote the checkpoint ``folder``, as a nested dictionary.
        config: of this run.
        folder: of the checkpoint.

    Raises:
        UserError: with both values.
    """
    there = former.get("optimizer", {})
    excluded = there.get("muon", {}).get("exclude", []) if isinstance(there.get("muon"), dict) else []
    pairs = {"name": (config.name, there.get("name", "adamw")), "muon.exclude": (config.muon.exclude, excluded)}
    for key, (now, then) in pairs.items():
        if now != then:
            raise UserError(
                f"optimizer.{key} is {now}, but {folder} was trained with {then} and holds the states of that "
                "optimizer; set it back, or start a new run_folder with model.initialize_from"
            )


def describe(config: OptimizerConfig, shapes: Shapes, tables: Collection[str]) -> list[str]:
    """Return lines about the optimizer for the start summary.

    Args:
        config: of the run.
        shapes: of all trainable parameters of the whole model, by name.
        tables: names of embeddings and heads.
    """
    lines = [f"optimizer   {_describe_kind(config, shapes, tables)}"]
    for group in config.groups:
        values = [
            *([f"learning rate {group.learning_rate:g}"] if group.learning_rate is not None else []),
            *([f"weight decay {group.weight_decay:g}"] if group.weight_decay is not None else []),
        ]
        mine = [shape for name, shape in shapes.items() if matches(name, patterns_of(group))]
        lines.append(f"group       {', '.join(patterns_of(group))}: {_counted(mine)}, {', '.join(values)}")
    if config.child_tuning is not None:
        lines.append(f"child-tuning in each step {config.child_tuning:.3g} of the elements of every parameter learn")
    return lines


def _describe_kind(config: OptimizerConfig, shapes: Shapes, tables: Collection[str]) -> str:
    rates = f"learning rate {config.learning_rate:g}, weight decay {config.weight_decay:g}"
    if config.name == "adamw_8bit":
        coded = [shape for shape in shapes.values() if has_8bit_states(shape)]
        return f"adamw_8bit, with 8-bit states of {_counted(coded)}, fp32 states of the rest; {rates}"
    if config.name != "muon":
        return f"{config.name}, {rates}"
    mine = [shape for name, shape in shapes.items() if is_muons(name, len(shape), config, tables)]
    return f"muon for {_counted(mine)}, adamw for the rest; {rates}"


def _counted(shapes: Sequence[tuple[int, ...]]) -> str:
    return f"{len(shapes)} parameters with {sum(map(math.prod, shapes)):,} elements"
