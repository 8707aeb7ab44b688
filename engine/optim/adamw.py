"""AdamW with states or weights in bf16. fp32 weights with fp32 states are updated by PyTorch's fused AdamW instead."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.random_bits import mixed, random_bits
from .elementwise import CHUNK_ELEMENTS as CHUNK_ELEMENTS
from .elementwise import ElementwiseOptimizer, write


class CompactAdamW(ElementwiseOptimizer):
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) for weights and states in fp32 or bf16.

    States have the names and meaning of ``torch.optim.AdamW``: ``step``, ``exp_avg`` and ``exp_avg_sq``. See the base
    class for the arguments; ``defaults`` are ``lr``, ``betas``, ``eps`` and ``weight_decay``.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def update_chunk(  # type: ignore[override]
        weight: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        first: Tensor,
        width: Tensor,
        numbers: Tensor,
        keys: Tensor,
        skip: Tensor,
        divisor: Tensor,
    ) -> None:
        """See the base class."""
        one_minus_beta1, beta2, one_minus_beta2, root_correction2, eps, step_size, decay = numbers.unbind()
        gradient, before = gradient.float() / divisor, weight.float()
        mean, square = exp_avg.float(), exp_avg_sq.float()
        mean = mean + (gradient - mean) * one_minus_beta1
        square = square * beta2 + gradient * gradient * one_minus_beta2
        # The small terms are added first, so that the weight is rounded once instead of twice.
        change = step_size * (mean / (square.sqrt() / root_correction2 + eps)) + decay * before
        rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape)
        bits = random_bits(first + rows[:, None] * width + columns, keys)
        skipped = skip != 0
        write(weight, before - change, bits, skipped)
        write(exp_avg, mean, bits >> 16, skipped)
        write(exp_avg_sq, square, mixed(bits ^ 0x5BD1E995), skipped)

    @staticmethod
    def numbers(group: dict[str, Any], step: int) -> list[float]:
        """Return 1 - beta1, beta2, 1 - beta2, the root of the second moment's bias correction, eps, learning rate over
        the first moment's correction, and decay of the weight.
        """
        (beta1, beta2), rate = group["betas"], group["lr"]
        root_correction2 = math.sqrt(1 - beta2**step)
        step_size = rate / (1 - beta1**step)
        return [1 - beta1, beta2, 1 - beta2, root_correction2, group["eps"], step_size, rate * group["weight_decay"]]
