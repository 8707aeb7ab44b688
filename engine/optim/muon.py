"""Muon: momentum whose singular values are all made about one. It updates the matrices of the blocks.

Embeddings, the head, norms and biases have another optimizer, see :mod:`.groups`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...kernels.random_bits import random_bits, stream_key
from .base import TrainingOptimizer
from .elementwise import write
from .local import local_part, sharded_dim
from .matrix_exchange import MatrixExchange
from .newton_schulz import newton_schulz, newton_schulz_flops
from .positions import row_chunks

_CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Elements rounded at a time, by device."""
_RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates that Moonlight found."""


class _Update(NamedTuple):
    """A parameter that is updated in this step."""

    name: str
    group: dict[str, Any]
    parameter: Tensor
    state: dict[str, Tensor]


class Orthogonalization(NamedTuple):
    """A matrix, or a stack of them, of which a step computes the products of Newton and Schulz."""

    parameter: Tensor
    shape: tuple[int, ...]
    """Of what is computed at once."""
    flops: float
    """Floating-point operations of the products."""
    exchange: Hashable
    """What those have in common that are exchanged together; None: this rank has it whole, and computes it itself."""
    ranks: int
    """Ranks that compute one of these each at the same time."""


class Muon(TrainingOptimizer):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) with decoupled weight decay.

    ``momentum_buffer`` becomes ``momentum * momentum_buffer + (1 - momentum) * gradient``. With Nesterov momentum, the
    same average of it and the gradient is orthogonalized, otherwise the buffer itself. The weight moves by the learning
    rate times ``scale`` of the result, as in ``torch.optim.Muon``.

    Matrices that are sharded are brought to one rank each, see :class:`~.matrix_exchange.MatrixExchange`. Stacks of
    experts, [experts, rows, columns], are matrices each, and their own sizes scale the update; a stack that is sharded
    by experts only is not exchanged.

    Args:
        groups: parameter groups of named parameters.
        state_dtype: of the momentum: fp32 or bf16, which is rounded stochastically, as bf16 weights are.
        seed: of the random rounding.
        dtype: of the iteration, and of the tensors that are exchanged.
        num_steps: iterations.
        scale: rms: 0.2 sqrt(max(rows, columns)), so that updates are as large as AdamW's and its learning rate and
            weight decay apply (Liu et al., 2025, https://arxiv.org/abs/2502.16982). spectral: sqrt(max(1,
            rows / columns)), of Jordan et al.
        nesterov: see above.
        defaults: ``lr``, ``momentum`` and ``weight_decay``.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state_dtype: torch.dtype,
        seed: int,
        dtype: torch.dtype,
        num_steps: int,
        scale: str,
        nesterov: bool,
        **defaults: Any,
    ):
        super().__init__(groups, {"weight_decay": 0.0, **defaults})
        self._state_dtype, self._seed, self._dtype, self._num_steps = state_dtype, seed, dtype, num_steps
        self._scale, self._nesterov = scale, nesterov
        self._exchanges: dict[tuple[Tensor, ...], MatrixExchange] = {}

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """See the base class."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=self._state_dtype)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, without a host sync. All ranks that share them must call this.

        ``step`` is on the host, which does not know ``found_inf``: it also counts skipped steps.
        """
        assert closure is None
        whole, shared = [], defaultdict(list)
        for name, group, parameter in self.named():
            if parameter.grad is None:
                continue
            update = _Update(name, group, parameter, self.state_of(parameter))
            update.state["step"] += 1
            if (exchange := _exchange_of(parameter)) is None:
                whole.append(update)
            elif parameter.ndim == 2 or local_part(parameter).shape[0] > 0:
                shared[exchange].append(update)
            # else: a part of a stack without matrices, on all ranks that would exchange it
        for update in whole:
            self._apply(update, self._orthogonalized(self._direction(update)))
        for updates in shared.values():
            self._exchange(updates)

    def orthogonalizations(self) -> Iterator[Orthogonalization]:
        """Return what a step orthogonalizes on this rank, or on those that share the work with it, in its order."""
        for _, _, parameter in self.named():
            exchange = _exchange_of(parameter)
            shape, ranks = tuple(local_part(parameter).shape), 1
            if exchange is not None:
                work = MatrixExchange([parameter])  # type: ignore[list-item]
                shape, ranks = work.shapes[0], work.ranks_of_round
            flops = newton_schulz_flops(shape, self._num_steps)
            yield Orthogonalization(parameter, shape, flops, exchange, ranks)

    def _exchange(self, updates: list[_Update]) -> None:
        """Update parameters of which other ranks have parts; all on the same mesh with the same placement."""
        parameters = tuple(update.parameter for update in updates)
        if parameters not in self._exchanges:
            self._exchanges[parameters] = MatrixExchange(parameters)  # type: ignore[arg-type]
        exchange = self._exchanges[parameters]
        for numbers in exchange.rounds():
            some = [updates[number] for number in numbers]
            directions = [self._direction(update).to(self._dtype) for update in some]
            results = exchange.apply(numbers, directions, self._orthogonalized)
            for update, result in zip(some, results, strict=True):
                self._apply(update, result)

    def _orthogonalized(self, direction: Tensor) -> Tensor:
        return newton_schulz(direction.to(self._dtype), self._num_steps)

    def _direction(self, update: _Update) -> Tensor:
        """Update the momentum of this rank's shard, and return its fp32 matrix to be orthogonalized."""
        assert update.parameter.grad is not None
        gradient = local_part(update.parameter.grad).float()
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale.to(gradient.device)
        buffer, share = local_part(update.state["momentum_buffer"]), 1 - update.group["momentum"]
        momentum = buffer.float().lerp(gradient, share)
        self._write(update, "momentum_buffer", buffer, momentum)
        return gradient.lerp(momentum, update.group["momentum"]) if self._nesterov else momentum

    def _apply(self, update: _Update, result: Tensor) -> None:
        """Change this rank's shard of a weight."""
        weight, rate = local_part(update.parameter), update.group["lr"]
        rows, columns = update.parameter.shape[-2:]
        if self._scale == "rms":
            scale = _RMS_OF_ADAMW * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1.0, rows / columns))
        changed = weight.float() * (1 - rate * update.group["weight_decay"])
        changed.add_(result.to(weight.device).float(), alpha=-rate * scale)
        self._write(update, "weight", weight, changed)

    def _write(self, update: _Update, stream: str, target: Tensor, values: Tensor) -> None:
        """Write fp32 ``values`` unless the step is skipped; ``stream`` names the random bits of a bf16 target."""
        skipped = torch.zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf != 0
        skipped = skipped.to(target.device)
        if target.dtype == torch.float32 or target.numel() == 0:
            target.copy_(torch.where(skipped, target, values))
            return
        step = int(update.state["step"].item())
        key = torch.tensor(stream_key(self._seed, step, f"muon.{stream}.{update.name}"), dtype=torch.int32)
        key = key.to(target.device, non_blocking=True)
        flat, flat_values = target.view(-1, target.shape[-1]), values.view(-1, target.shape[-1])
        for rows, positions in row_chunks(update.parameter, _CHUNK_ELEMENTS.get(target.device.type, 2**16)):
            write(flat[rows], flat_values[rows], random_bits(positions, key), skipped)


def _exchange_of(parameter: Tensor) -> Hashable:
    """Return what parameters have in common that are exchanged together; None for one that is not exchanged."""
    if isinstance(parameter, DTensor) and _splits_matrices(parameter):
        return parameter.device_mesh, parameter.placements, parameter.ndim
    return None


def _splits_matrices(parameter: DTensor) -> bool:
    """Return whether no rank has whole matrices; a shard of a stack along its first dimension has."""
    inside = range(parameter.ndim - 2, parameter.ndim)
    mesh = parameter.device_mesh
    return any(mesh.size(axis) > 1 and sharded_dim(place) in inside for axis, place in enumerate(parameter.placements))
