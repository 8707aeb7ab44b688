"""AdamW with states or weights in bf16: computes in fp32, and stores with stochastic rounding.

bf16 has 8 bits of precision: rounding to nearest would lose every change below 2^-9 of a number, at every step again.
fp32 weights with fp32 states are updated by PyTorch's fused AdamW instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...kernels.random_bits import mixed, random_bits, stream_key
from .average import WeightAverage
from .local import local_part
from .stochastic_rounding import round_stochastically

CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Elements updated at a time, by device. The temporaries of an uncompiled update take some 80 bytes for each (5 MB, 1.3
GB); a compiled one needs none."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) for weights and states in fp32 or bf16.

    States have the names and meaning of ``torch.optim.AdamW``: ``step`` ([] fp32 on the CPU, so that reading it never
    waits for the device), ``exp_avg`` and ``exp_avg_sq``. Parameters may be DTensors that are sharded along their first
    dimension, matrices also along their second; every rank updates its own shard, and copies stay equal.

    Args:
        groups: parameter groups of named parameters: ``{"params": [(name, parameter)]}``.
        state_dtype: of both moments: fp32 or bf16.
        seed: of the random rounding.
        compiled: fuse the update into one kernel with ``torch.compile``. None: on CUDA only.
        defaults: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of groups that do not set them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state_dtype: torch.dtype,
        seed: int,
        compiled: bool | None = None,
        **defaults: Any,
    ):
        super().__init__(groups, {"weight_decay": 0.0, **defaults})
        self._state_dtype, self._seed, self._compiled = state_dtype, seed, compiled
        self._places: dict[Tensor, Tensor] = {}
        self.found_inf: Tensor | None = None
        """[] fp32; a non-zero value makes the next step change nothing, as in PyTorch's fused AdamW."""
        self.grad_scale: Tensor | None = None
        """[] fp32; gradients are divided by it, as in PyTorch's fused AdamW."""
        self.average: WeightAverage | None = None
        """Follows the weights."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No host sync.

        ``step`` is on the host, which does not know ``found_inf``: it also counts skipped steps.
        """
        assert closure is None
        updated, numbers, keys = [], [], []
        for name, group, parameter in self._parameters():
            if parameter.grad is None:
                continue
            state = self._state_of(parameter)
            state["step"] += 1
            step = int(state["step"].item())
            updated.append((parameter, state))
            numbers.append(_numbers(group, step))
            keys.append(stream_key(self._seed, step, name))
        if not updated:
            return
        # One transfer each for all parameters. Numbers passed as tensors never cause torch.compile to recompile.
        device = local_part(updated[0][0]).device
        numbers_PN = _sent(torch.tensor(numbers, dtype=torch.float32), device)
        keys_P2 = _sent(torch.tensor(keys, dtype=torch.int32), device)
        skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf.to(device)
        divisor = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale.to(device)
        for position, (parameter, state) in enumerate(updated):
            self._update(parameter, state, numbers_PN[position], keys_P2[position], skip, divisor)

    def _parameters(self) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, group, parameter

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self._state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._state_dtype)
        return state

    def _update(self, parameter: Tensor, state: dict[str, Tensor], *settings: Tensor) -> None:
        """Update this rank's shard, a chunk at a time.

        Args:
            settings: numbers, keys, skip and divisor of :func:`update_chunk`.
        """
        assert parameter.grad is not None
        tensors = [local_part(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        weight = tensors[0]
        if weight.numel() == 0:
            return
        if parameter not in self._places:
            self._places[parameter] = torch.tensor(shard_place(parameter), device=weight.device)
        first, width = self._places[parameter]
        size = CHUNK_ELEMENTS.get(weight.device.type, 2**16)
        consecutive = weight.shape[1:] == parameter.shape[1:]  # in the whole parameter; a chunk is then one long row
        row = size if consecutive else weight.shape[1]
        size = max(1, size // row) * row
        flat, count = [tensor.view(-1) for tensor in tensors], weight.numel()
        compiled = weight.is_cuda if self._compiled is None else self._compiled
        update: Callable[..., None] = _compiled_update() if compiled else update_chunk
        for start in range(0, count, size):
            # The data of a view is not a view: torch.compile would compile one variant for each kind of base of a view.
            chunk = [tensor[start : start + size].view(-1, min(row, count - start)).data for tensor in flat]
            update(*chunk, first + (start if consecutive else start // row * width), width, *settings)


def update_chunk(
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
    """Update one chunk by AdamW in place. All arithmetic is fp32; bf16 tensors are written with stochastic rounding.

    Args:
        weight, gradient, exp_avg, exp_avg_sq: [rows, columns], each fp32 or bf16.
        first: [] int64, position of the first element in the whole parameter.
        width: [] int64, distance between rows in the whole parameter.
        numbers: [7] fp32, see :func:`_numbers`.
        keys: [2] int32, see :func:`~retemper.kernels.random_bits.stream_key`.
        skip: [] fp32, non-zero to change nothing.
        divisor: [] fp32, of the gradient.
    """
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
    _write(weight, before - change, bits, skipped)
    _write(exp_avg, mean, bits >> 16, skipped)
    _write(exp_avg_sq, square, mixed(bits ^ 0x5BD1E995), skipped)


def _write(target: Tensor, values: Tensor, bits: Tensor, skipped: Tensor) -> None:
    written = round_stochastically(values, bits) if target.dtype == torch.bfloat16 else values
    target.copy_(torch.where(skipped, target, written))


@functools.cache
def _compiled_update() -> Callable[..., None]:
    return torch.compile(update_chunk, dynamic=True)


def _numbers(group: dict[str, Any], step: int) -> list[float]:
    """Return the numbers that :func:`update_chunk` uses of a group's settings.

    These are 1 - beta1, beta2, 1 - beta2, the root of the second moment's bias correction, eps, learning rate over the
    first moment's correction, and decay of the weight.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    root_correction2 = math.sqrt(1 - beta2**step)
    step_size = rate / (1 - beta1**step)
    return [1 - beta1, beta2, 1 - beta2, root_correction2, group["eps"], step_size, rate * group["weight_decay"]]


def shard_place(parameter: Tensor) -> tuple[int, int]:
    """Return the position of the first element of this rank's shard in the whole parameter, and the distance of its
    rows there.
    """
    width = math.prod(parameter.shape[1:])
    if not isinstance(parameter, DTensor):
        return 0, width
    sharded = [dim for dim in range(1, parameter.ndim) if any(place.is_shard(dim) for place in parameter.placements)]
    assert not sharded or parameter.ndim == 2, f"{parameter.placements} of {tuple(parameter.shape)}"
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] * width + (offset[1] if sharded else 0), width


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
