"""Scale the loss of fp16 training, so that small gradients do not become zero.

fp16 has no number below 6e-8 and none above 65,504. The loss is multiplied by a power of two before the backward pass,
and the optimizer divides the gradients by it. If a gradient overflows, the step is skipped and the scale is halved;
after a number of steps without overflow, it is doubled. See Micikevicius et al., 2018,
https://arxiv.org/abs/1710.03740, section 3.2. The arithmetic is that of ``torch.amp.GradScaler``.

Everything is on the device, so no step waits for it. A power of two changes no bit of a gradient, except where it
prevents an underflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.settings import TrainingConfig

FACTOR = 2.0
"""The scale is multiplied or divided by this."""

LARGEST = 2.0**64
"""Limit of the scale. Scaled losses must be finite in fp32, also if no gradient ever overflows."""


class LossScaler:
    """The scale of the loss and its history.

    Args:
        config: of the training.
        device: of the model.
    """

    def __init__(self, config: TrainingConfig, device: torch.device):
        self._minimum, self._window = config.min_loss_scale, config.loss_scale_window
        self.state = torch.tensor([config.initial_loss_scale, 0.0, 0.0], device=device)
        """[3] fp32 on the device: the scale, the number of steps since it changed or a gradient overflowed, and the
        number of overflows of the run. Each step makes a new tensor."""

    @property
    def scale(self) -> Tensor:
        """Return the scale of the next step, [] fp32 on the device."""
        return self.state[0]

    @torch.no_grad()
    def update(self, loss: Tensor, not_finite: Tensor) -> Tensor:
        """Set the scale of the next step. All ranks must call this.

        Args:
            loss: [] this rank's part of the loss.
            not_finite: [] fp32, 1 if a gradient of any rank is not finite, else 0.

        Returns:
            [] fp32 on the device: 1 if gradients overflowed, which a smaller scale prevents; 0 if they are finite, or
            if the loss itself is not.
        """
        scale, steps, overflows = self.state.unbind()
        lost = (~loss.isfinite()).to(self.state)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(lost, op=dist.ReduceOp.MAX)
        overflow = not_finite * (1 - lost)
        steps = (steps + 1) * (1 - not_finite)
        full = steps >= self._window
        grows = full & (scale < LARGEST)
        # One below the minimum, and not zero, shows the host that there is no suitable scale.
        smaller = (scale / FACTOR).clamp(min=self._minimum / FACTOR)
        scale = torch.where(not_finite > 0, smaller, torch.where(grows, scale * FACTOR, scale))
        self.state = torch.stack([scale, torch.where(full, 0.0, steps), overflows + overflow])
        return overflow

    def problem(self, scale: float) -> str | None:
        """Return why a run with this scale cannot continue, or None."""
        if scale >= self._minimum:
            return None
        return (
            f"the loss scale fell below training.min_loss_scale {self._minimum:g}: gradients are not finite in fp16 "
            "with any scale; set training.precision to fp32, or to bf16 where the hardware has it"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state in JSON's types. Waits for the device."""
        scale, steps, overflows = self.state.tolist()
        return {"scale": scale, "steps": int(steps), "overflows": int(overflows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        numbers = [state["scale"], state["steps"], state["overflows"]]
        self.state = torch.tensor(numbers, dtype=torch.float32, device=self.state.device)


def metrics(state: Sequence[float]) -> dict[str, float]:
    """Return the numbers of :attr:`LossScaler.state` for the records of a run; none if it is empty."""
    return {"loss_scale": state[0], "overflow_steps": int(state[2])} if state else {}


def scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``value`` times the scale; None: one."""
    return value if scale is None else value * scale


def unscaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``value``, of scaled losses or gradients, divided by their scale; None: one."""
    return value if scale is None else value / scale


def total_divisor(clip: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """Return the divisor of scaled gradients that also clips them; None: one.

    Args:
        clip: [] fp32, of gradients without a scale.
        scale: [] fp32.
    """
    return scale if clip is None else scaled(clip, scale)
