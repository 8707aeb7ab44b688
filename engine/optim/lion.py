"""Lion: momentum whose sign is the update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.random_bits import random_bits
from .elementwise import ElementwiseOptimizer, write


class Lion(ElementwiseOptimizer):
    """Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675, Program 1) for weights and states in fp32 or bf16.

    The update is ``lr * (sign(beta1 * exp_avg + (1 - beta1) * gradient) + weight_decay * weight)``; then ``exp_avg``
    becomes ``beta2 * exp_avg + (1 - beta2) * gradient``. See the base class for the arguments; ``defaults`` are ``lr``,
    ``betas`` and ``weight_decay``.
    """

    state_names = ("exp_avg",)

    @staticmethod
    def update_chunk(  # type: ignore[override]
        weight: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        first: Tensor,
        width: Tensor,
        numbers: Tensor,
        keys: Tensor,
        skip: Tensor,
        divisor: Tensor,
    ) -> None:
        """See the base class."""
        beta1, one_minus_beta1, beta2, one_minus_beta2, rate, decay = numbers.unbind()
        gradient, before, mean = gradient.float() / divisor, weight.float(), exp_avg.float()
        change = rate * (mean * beta1 + gradient * one_minus_beta1).sign() + decay * before
        rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape)
        bits = random_bits(first + rows[:, None] * width + columns, keys)
        skipped = skip != 0
        write(weight, before - change, bits, skipped)
        write(exp_avg, mean * beta2 + gradient * one_minus_beta2, bits >> 16, skipped)

    @staticmethod
    def numbers(group: dict[str, Any], step: int) -> list[float]:
        """Return beta1, 1 - beta1, beta2, 1 - beta2, learning rate, and decay of the weight."""
        (beta1, beta2), rate = group["betas"], group["lr"]
        return [beta1, 1 - beta1, beta2, 1 - beta2, rate, rate * group["weight_decay"]]
