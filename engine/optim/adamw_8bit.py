"""AdamW with states of 8 bits, for matrices (Dettmers et al., 2021, https://arxiv.org/abs/2110.02861).

torchao defines the codes and rounds to them. Its own optimizers are not used: their states are tensor subclasses that
checkpoints cannot reshard, their layout depends on the shards, and they round bf16 weights with PyTorch's generators.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...kernels.random_bits import random_bits
from ..errors import UserError, install_command
from .elementwise import ElementwiseOptimizer, write
from .groups import BLOCK_SIZE
from .local import local_part, sent, sharded_dim


class AdamW8bit(ElementwiseOptimizer):
    """AdamW whose two moments are stored in 8 bits per element, and a scale for each block of 256 elements of a row.

    An element is the product of the scale of its block and of one of 256 numbers, of which a code is the index; there
    is a table of signed numbers for the first moment and one of positive numbers for the second. An update computes in
    fp32 from the decoded states, uses the new moments before they are rounded to the nearest code, and rounds bf16
    weights stochastically.

    States of a parameter [..., width]: ``exp_avg_codes`` and ``exp_avg_sq_codes``, uint8 of its shape;
    ``exp_avg_scale`` and ``exp_avg_sq_scale``, [..., width / 256] fp32, sharded as the parameter is. As no block is
    divided between rows or ranks, all are the same in every layout. ``step`` as in the base class.

    Args:
        groups: parameter groups of named parameters for which
            :func:`~retemper.engine.optim.groups.has_8bit_states` holds.
        seed: of the random rounding.
        compiled: see the base class.
        defaults: ``lr``, ``betas``, ``eps`` and ``weight_decay``.

    Raises:
        UserError: torchao is not installed, or tensor parallelism divides blocks.
    """

    state_names = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale")

    def __init__(self, groups: list[dict[str, Any]], seed: int, compiled: bool | None = None, **defaults: Any):
        if importlib.util.find_spec("torchao") is None:
            raise UserError(
                f"optimizer.name is adamw_8bit, but torchao is not installed; {install_command('torchao')}, or use "
                "adamw with optimizer.state_dtype bf16"
            )
        super().__init__(groups, torch.float32, seed, compiled, **defaults)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for name, _, parameter in self.named():
            _require_whole_blocks(name, parameter)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """See the base class."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[f"{moment}_scale"] = _zero_scales(parameter)
        return state

    def _update(self, parameter: Tensor, state: dict[str, Tensor], *settings: Tensor) -> None:
        super()._update(parameter, state, *settings, *self._tables_on(local_part(parameter).device))

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the numbers of the codes on ``device``, signed and positive: [256] fp32 each."""
        if device not in self._tables:
            from torchao.optim.quant_utils import create_dynamic_map

            signed, positive = (torch.tensor(create_dynamic_map(signed)) for signed in (True, False))
            self._tables[device] = sent(signed, device), sent(positive, device)
        return self._tables[device]

    @staticmethod
    def update_chunk(  # type: ignore[override]
        weight: Tensor,
        gradient: Tensor,
        exp_avg_codes: Tensor,
        exp_avg_scale: Tensor,
        exp_avg_sq_codes: Tensor,
        exp_avg_sq_scale: Tensor,
        first: Tensor,
        width: Tensor,
        numbers: Tensor,
        keys: Tensor,
        skip: Tensor,
        divisor: Tensor,
        signed: Tensor,
        positive: Tensor,
    ) -> None:
        """See the base class.

        Args:
            signed, positive: [256] fp32, the numbers of the codes of both moments.
        """
        one_minus_beta1, beta2, one_minus_beta2, correction1, root_correction2, eps, rate, decay = numbers.unbind()
        gradient, before = gradient.float() / divisor, weight.float()
        mean = _decoded(exp_avg_codes, exp_avg_scale, signed)
        square = _decoded(exp_avg_sq_codes, exp_avg_sq_scale, positive)
        mean = mean + (gradient - mean) * one_minus_beta1
        square = square * beta2 + gradient * gradient * one_minus_beta2
        denominator = square.sqrt() / root_correction2 + eps
        after = before - decay * before - rate * (mean / correction1) / denominator
        rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape)
        bits = random_bits(first + rows[:, None] * width + columns, keys)
        skipped = skip != 0
        write(weight, after, bits, skipped)
        _encode(mean, signed, exp_avg_codes, exp_avg_scale, skipped)
        _encode(square, positive, exp_avg_sq_codes, exp_avg_sq_scale, skipped)

    @staticmethod
    def numbers(group: dict[str, Any], step: int) -> list[float]:
        """Return 1 - beta1, beta2, 1 - beta2, the first moment's bias correction, the root of the second's, eps,
        learning rate, and decay of the weight.
        """
        (beta1, beta2), rate = group["betas"], group["lr"]
        correction1, root_correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        decay = rate * group["weight_decay"]
        return [1 - beta1, beta2, 1 - beta2, correction1, root_correction2, group["eps"], rate, decay]


def _decoded(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Return the fp32 numbers of ``codes``, of the same shape."""
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(codes, table, scale.reshape(-1))


def _encode(values: Tensor, table: Tensor, codes: Tensor, scale: Tensor, skipped: Tensor) -> None:
    """Write the codes and scales of fp32 ``values``, unless ``skipped``."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    scaled, scales = scale_tensor(values, BLOCK_SIZE)
    codes.copy_(torch.where(skipped, codes, quantize_8bit_with_qmap(scaled, table)))
    scale.copy_(torch.where(skipped, scale, scales.view(scale.shape)))


def _zero_scales(parameter: Tensor) -> Tensor:
    """Return a scale of zero for each block of ``parameter``, sharded as it is."""
    local = local_part(parameter)
    zeros = local.new_zeros((*local.shape[:-1], local.shape[-1] // BLOCK_SIZE), dtype=torch.float32)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // BLOCK_SIZE))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    scales = DTensor.from_local(zeros, mesh, placements, run_check=False, shape=shape, stride=stride)
    return scales.to(parameter.device)  # from_local moves to the mesh's device, also what is kept in host memory


def _require_whole_blocks(name: str, parameter: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        return
    last, mesh = parameter.ndim - 1, parameter.device_mesh
    sizes: list[int] = [
        mesh.size(axis) for axis, place in enumerate(parameter.placements) if sharded_dim(place) == last
    ]
    ranks, width = math.prod(sizes), parameter.shape[-1]
    if width % (ranks * BLOCK_SIZE):
        raise UserError(
            f"optimizer.name adamw_8bit has a scale for each block of {BLOCK_SIZE} elements of a row, but {ranks} "
            f"tensor-parallel ranks divide the rows of {name}, which are {width} wide, within a block; lower "
            "parallel.tensor, or use adamw with optimizer.state_dtype bf16"
        )
