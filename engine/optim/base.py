"""The base class of the optimizers of a run: what a step of training needs beyond ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .average import WeightAverage
from .child_tuning import ChildTuning


class TrainingOptimizer(torch.optim.Optimizer):
    """An optimizer whose update can be skipped and whose gradients can be divided by a number on the device.

    Parameters are named (``{"params": [(name, parameter)]}``), and may be DTensors. All states are tensors: checkpoints
    store each as ``optimizer.{state}.{parameter}``. A state of the parameter's shape is sharded as the parameter is.

    Every parameter group has ``lr_scale``: its learning rate divided by that of the schedule.
    """

    found_inf: Tensor | None = None
    """[] fp32; a non-zero value makes the next step change nothing, as in PyTorch's fused AdamW."""
    grad_scale: Tensor | None = None
    """[] fp32; gradients are divided by it, as in PyTorch's fused AdamW."""
    child_tuning: ChildTuning | None = None
    """Masks gradients before each step."""
    average: WeightAverage | None = None
    """Follows the weights."""

    def named(self) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
        """Return the name, the group and the tensor of every parameter."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, group, parameter

    def allocate(self) -> None:
        """Allocate the states of the parameters that have none, as before their first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state_of(parameter)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the states of ``parameter`` by name; allocate them if it has none."""
        raise NotImplementedError


class CombinedOptimizer(TrainingOptimizer):
    """Several optimizers of different parameters that step as one.

    Args:
        parts: the optimizers; their groups and states are shared, not copied.
    """

    def __init__(self, parts: Sequence[TrainingOptimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every part."""
        assert closure is None
        for part in self.parts:
            part.found_inf, part.grad_scale = self.found_inf, self.grad_scale
            part.step()

    def allocate(self) -> None:
        """See the base class."""
        for part in self.parts:
            part.allocate()
