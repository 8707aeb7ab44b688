"""PyTorch's fused AdamW, called with this rank's parts of parameters: DTensor's dispatch costs the host more than the
update costs a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import TrainingOptimizer
from .local import local_part


class FusedAdamW(torch.optim.AdamW, TrainingOptimizer):
    """``torch.optim.AdamW`` with ``fused=True`` for fp32 parameters, which may be DTensors, and without its options.

    States have the same names, shapes and values.

    Args:
        groups: parameter groups.
        settings: ``lr``, ``betas`` and ``eps``.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        super().__init__(groups, fused=True, **settings)
        self._parts: dict[Tensor, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No host sync."""
        assert closure is None
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            if updated:
                self._update(updated, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``. It replaces the states, of which the parts are remembered here."""
        super().load_state_dict(state_dict)
        self._parts.clear()

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        weights, exp_avgs, exp_avg_sqs, steps = map(
            list, zip(*(self._parts_of(parameter) for parameter in parameters), strict=True)
        )
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:  # a step that is skipped does not count
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """See the base class."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _parts_of(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Return this rank's part of a parameter and of its states, which are allocated before the first step."""
        parts = self._parts.get(parameter)
        if parts is None:
            state = self.state_of(parameter)
            tensors = (parameter, state["exp_avg"], state["exp_avg_sq"], state["step"])
            parts = self._parts[parameter] = tuple(map(local_part, tensors))
        return parts
