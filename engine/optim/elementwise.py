"""Optimizers that update every element on its own, with states or weights in bf16: they compute in fp32, and store with
stochastic rounding.

bf16 has 8 bits of precision: rounding to nearest would lose every change below 2^-9 of a number, at every step again.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...kernels.random_bits import stream_key
from .base import TrainingOptimizer
from .local import local_part, sent, sharded_dim
from .stochastic_rounding import round_stochastically

CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Elements updated at a time, by device. The temporaries of an uncompiled update take some 80 bytes for each (5 MB, 1.3
GB); a compiled one needs none."""


class ElementwiseOptimizer(TrainingOptimizer):
    """An optimizer whose update of an element depends on its own weight, gradient and states, in fp32 or bf16.

    ``step`` is [] fp32 on the CPU, so that reading it never waits for the device. The other states have the shape of
    the parameter, or one element for each block of consecutive elements of a row. Parameters may be DTensors that are
    sharded along their first dimension and one other; every rank updates its own shard, and copies stay equal.

    Args:
        groups: parameter groups of named parameters: ``{"params": [(name, parameter)]}``.
        state_dtype: of the states: fp32 or bf16.
        seed: of the random rounding.
        compiled: fuse the update into one kernel with ``torch.compile``. None: on CUDA only.
        defaults: settings of groups that do not set them.
    """

    state_names: tuple[str, ...]
    """Of all states but ``step``, in the order of the arguments of :meth:`update_chunk`."""

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
        self._places: dict[Tensor, tuple[_ShardPlace, Tensor]] = {}

    @staticmethod
    @abstractmethod
    def update_chunk(weight: Tensor, gradient: Tensor, *arguments: Tensor) -> None:
        """Update one chunk in place. All arithmetic is fp32; bf16 tensors are written with stochastic rounding.

        Args:
            weight, gradient: [rows, columns], each fp32 or bf16.
            arguments: the states, in the same rows, in the order of :attr:`state_names`; then
                first: [] int64, position of the first element in the whole parameter;
                width: [] int64, distance between rows in the whole parameter;
                numbers: [N] fp32, see :meth:`numbers`;
                keys: [2] int32, see :func:`~retemper.kernels.random_bits.stream_key`;
                skip: [] fp32, non-zero to change nothing;
                divisor: [] fp32, of the gradient.
        """

    @staticmethod
    @abstractmethod
    def numbers(group: dict[str, Any], step: int) -> list[float]:
        """Return the numbers that :meth:`update_chunk` uses of a group's settings."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No host sync.

        ``step`` is on the host, which does not know ``found_inf``: it also counts skipped steps.
        """
        assert closure is None
        updated, numbers, keys = [], [], []
        for name, group, parameter in self.named():
            if parameter.grad is None:
                continue
            state = self.state_of(parameter)
            state["step"] += 1
            step = int(state["step"].item())
            updated.append((parameter, state))
            numbers.append(self.numbers(group, step))
            keys.append(stream_key(self._seed, step, name))
        if not updated:
            return
        # One transfer each for all parameters. Numbers passed as tensors never cause torch.compile to recompile.
        device = local_part(updated[0][0]).device
        numbers_PN = sent(torch.tensor(numbers, dtype=torch.float32), device)
        keys_P2 = sent(torch.tensor(keys, dtype=torch.int32), device)
        skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf.to(device)
        divisor = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale.to(device)
        for position, (parameter, state) in enumerate(updated):
            self._update(parameter, state, numbers_PN[position], keys_P2[position], skip, divisor)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """See the base class."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in self.state_names:
                state[name] = torch.zeros_like(parameter, dtype=self._state_dtype)
        return state

    def _update(self, parameter: Tensor, state: dict[str, Tensor], *settings: Tensor) -> None:
        """Update this rank's shard, a chunk at a time.

        Args:
            settings: the arguments of :meth:`update_chunk` from the numbers on.
        """
        assert parameter.grad is not None
        tensors = [local_part(t) for t in (parameter, parameter.grad, *(state[name] for name in self.state_names))]
        weight = tensors[0]
        if weight.numel() == 0:
            return
        if parameter not in self._places:
            place = _shard_place(parameter)
            self._places[parameter] = place, torch.tensor([place.first, place.width], device=weight.device)
        (_, row, width), (first, distance) = self._places[parameter]
        count = weight.numel()
        size = CHUNK_ELEMENTS.get(weight.device.type, 2**16)
        flat = [tensor.view(-1) for tensor in tensors]
        compiled = weight.is_cuda if self._compiled is None else self._compiled
        update: Callable[..., None] = _compiled(self.update_chunk) if compiled else self.update_chunk
        for start, end in _chunks(count, row, size):
            num_rows = max(1, (end - start) // row)
            # The data of a view is not a view: torch.compile would compile one variant for each kind of base of a view.
            chunk = [
                tensor[start * len(tensor) // count : end * len(tensor) // count].view(num_rows, -1).data
                for tensor in flat
            ]
            update(*chunk, first + (start // row * width + start % row), distance, *settings)


def _chunks(count: int, row: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of chunks of about ``size`` of ``count`` elements: whole rows of ``row``, or parts of one."""
    if row <= size:
        size = size // row * row
        yield from ((start, min(start + size, count)) for start in range(0, count, size))
        return
    for start in range(0, count, row):
        yield from ((at, min(at + size, start + row)) for at in range(start, start + row, size))


def write(target: Tensor, values: Tensor, bits: Tensor, skipped: Tensor) -> None:
    """Write fp32 ``values`` into ``target``, with stochastic rounding by ``bits`` if it is bf16; unless ``skipped``."""
    written = round_stochastically(values, bits) if target.dtype == torch.bfloat16 else values
    target.copy_(torch.where(skipped, target, written))


@functools.cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(update, dynamic=True)


class _ShardPlace(NamedTuple):
    """Where the elements of this rank's shard are in the whole parameter."""

    first: int
    """Position of the first element."""
    row: int
    """Number of elements that are consecutive in both."""
    width: int
    """Distance of the beginnings of two rows in the whole parameter."""


def _shard_place(parameter: Tensor) -> _ShardPlace:
    if not isinstance(parameter, DTensor):
        return _ShardPlace(0, parameter.numel(), parameter.numel())
    sharded = sorted({dim for place in parameter.placements if (dim := sharded_dim(place))})
    assert len(sharded) < 2, f"{parameter.placements} of {tuple(parameter.shape)}"
    dim = sharded[0] if sharded else 0
    local, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    steps = [math.prod(parameter.shape[axis + 1 :]) for axis in range(parameter.ndim)]
    first = sum(at * step for at, step in zip(offset, steps, strict=True))
    return _ShardPlace(first, math.prod(local[dim:]), math.prod(parameter.shape[dim:]))
