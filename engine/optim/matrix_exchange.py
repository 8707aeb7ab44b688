"""Bring each sharded matrix to one rank, and the result back to the shards.

Matrices are dealt to the ranks that share them in turn. In a round every rank receives the parts of at most one matrix,
so no rank ever holds more than one whole matrix, however many there are. The transfers of a round overlap. They go
along one axis of the mesh after the other, so that only the process groups of the mesh are used.

Stacks of matrices may be sharded along their first dimension as well. The matrices of a rank are then those of its
part of the stack, and nothing is exchanged along the axes of that dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .local import sharded_dim


@dataclass(frozen=True)
class Part:
    """The place of one rank's shard in a matrix."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The indices of the shard in the whole matrix."""
        return tuple(slice(at, at + size) for at, size in zip(self.offset, self.shape, strict=True))


class MatrixExchange:
    """Applies a function of whole matrices to matrices that the ranks of one mesh share.

    Args:
        matrices: DTensors of one mesh, placement and number of dimensions, in the same order on every rank.
    """

    def __init__(self, matrices: Sequence[DTensor]):
        self._mesh = matrices[0].device_mesh
        placements = matrices[0].placements
        sizes = tuple(self._mesh.size(axis) for axis in range(self._mesh.ndim))
        stacked = matrices[0].ndim > 2
        self._apart = [axis for axis in range(self._mesh.ndim) if stacked and sharded_dim(placements[axis]) == 0]
        axes = [axis for axis in range(self._mesh.ndim) if sizes[axis] > 1 and axis not in self._apart]
        self._sharded = [axis for axis in axes if not placements[axis].is_replicate()]
        self._copied = [axis for axis in axes if placements[axis].is_replicate()]
        self._sizes = sizes
        self.shapes = [self._whole_shape(matrix) for matrix in matrices]
        """Of the whole matrices."""
        self._matrices = matrices

    @property
    def device(self) -> torch.device:
        """The device on which tensors are exchanged; parameters of a GPU run may be in host memory."""
        kind = self._mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @property
    def ranks_of_round(self) -> int:
        """The number of ranks that get one matrix each in a round."""
        return math.prod(self._sizes[axis] for axis in self._sharded + self._copied)

    def rounds(self) -> Iterator[range]:
        """Return the positions of the matrices of each round."""
        size, count = self.ranks_of_round, len(self.shapes)
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    def apply(self, numbers: range, mine: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return this rank's shards of ``function`` of each whole matrix. All ranks of the mesh must call this.

        Args:
            numbers: a round, of :meth:`rounds`.
            mine: this rank's shard of each matrix in it, all of one dtype.
            function: keeps the shape and the dtype.
        """
        owners = [self._owner(place) for place in range(len(numbers))]
        padded = [self._padded(number, shard) for number, shard in zip(numbers, mine, strict=True)]
        gathered = self._gather(padded, owners)
        results: list[Tensor | None] = [None] * len(numbers)
        for place, (number, flat) in enumerate(zip(numbers, gathered, strict=True)):
            if flat is not None:
                results[place] = self._split(number, function(self._joined(number, flat)))
        gathered.clear()
        shards = self._scatter(results, owners, padded)
        return [flat[: shard.numel()].view(shard.shape) for flat, shard in zip(shards, mine, strict=True)]

    def _whole_shape(self, matrix: DTensor) -> tuple[int, ...]:
        """Return the shape of the matrices that the ranks exchange: of a stack, those of this rank's part of it."""
        return (matrix.to_local().shape[0], *matrix.shape[1:]) if self._apart else tuple(matrix.shape)

    @cached_property
    def _parts(self) -> list[list[Part]]:
        """[matrix][shard] in the order of the sharded axes, the last one fastest. Exchanged in the first round."""
        places, matrices = [], self._matrices
        for matrix in matrices:
            shape, offset = compute_local_shape_and_global_offset(matrix.shape, self._mesh, matrix.placements)
            # An empty shard may have any offset.
            offset = offset if math.prod(shape) else (0,) * matrix.ndim
            places.append([0 if self._apart else offset[0], *offset[1:], *shape])
        table = torch.tensor(places, dtype=torch.int64, device=self.device)[None]
        for axis in reversed(self._sharded):
            received = [torch.empty_like(table) for _ in range(self._sizes[axis])]
            dist.all_gather(received, table.contiguous(), group=self._mesh.get_group(axis))
            table = torch.cat(received)
        ndim = matrices[0].ndim
        by_matrix = table.transpose(0, 1).tolist()
        return [[Part(tuple(row[:ndim]), tuple(row[ndim:])) for row in rows] for rows in by_matrix]

    def _owner(self, place: int) -> tuple[int, ...]:
        """Return the coordinate of the rank that gets the matrix at this place of a round."""
        here = self._mesh.get_coordinate()
        assert here is not None
        coordinate = list(here)
        for axis in reversed(range(len(here))):
            if axis not in self._apart:
                coordinate[axis] = place % self._sizes[axis]
                place //= self._sizes[axis]
        return tuple(coordinate)

    def _largest(self, number: int) -> int:
        return max(math.prod(part.shape) for part in self._parts[number])

    def _padded(self, number: int, shard: Tensor) -> Tensor:
        """Return the shard, flat and as long as the largest one: gather needs equal sizes."""
        flat = torch.zeros(self._largest(number), dtype=shard.dtype, device=self.device)
        flat[: shard.numel()].copy_(shard.reshape(-1))
        return flat

    def _takes_part(self, owner: tuple[int, ...], axes: Sequence[int]) -> bool:
        """Return whether this rank has the owner's coordinate along ``axes``."""
        here = self._mesh.get_coordinate()
        assert here is not None
        return all(here[axis] == owner[axis] for axis in axes)

    def _gather(self, padded: Sequence[Tensor], owners: Sequence[tuple[int, ...]]) -> list[Tensor | None]:
        """Return the padded shards of each matrix, one after the other, on its owner; None elsewhere."""
        held: list[Tensor | None] = [
            flat if self._takes_part(owner, self._copied) else None for flat, owner in zip(padded, owners, strict=True)
        ]
        for axis in reversed(self._sharded):
            works, group = [], self._mesh.get_group(axis)
            for place, (flat, owner) in enumerate(zip(held, owners, strict=True)):
                if flat is None:
                    continue
                target = None
                if self._takes_part(owner, [axis]):
                    target = flat.new_empty(self._sizes[axis], flat.numel())
                list_ = list(target) if target is not None else None
                works.append(dist.gather(flat, list_, group=group, group_dst=owner[axis], async_op=True))
                held[place] = target
            _wait(works)
            held = [None if flat is None else flat.view(-1) for flat in held]
        return held

    def _scatter(
        self, results: Sequence[Tensor | None], owners: Sequence[tuple[int, ...]], padded: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return this rank's padded shard of each result, which its owner has; written over ``padded``."""
        held = list(results)
        for position, axis in enumerate(self._sharded):
            works, group = [], self._mesh.get_group(axis)
            inner = math.prod(self._sizes[one] for one in self._sharded[position + 1 :])
            for place, (whole, owner) in enumerate(zip(held, owners, strict=True)):
                # Ranks with the owner's coordinate along the axes that follow.
                if not self._takes_part(owner, [*self._copied, *self._sharded[position + 1 :]]):
                    continue
                last = position == len(self._sharded) - 1
                target = padded[place] if last else padded[place].new_empty(inner * padded[place].numel())
                list_ = None
                if self._takes_part(owner, [axis]):
                    assert whole is not None
                    list_ = list(whole.view(self._sizes[axis], -1))
                works.append(dist.scatter(target, list_, group=group, group_src=owner[axis], async_op=True))
                held[place] = target
            _wait(works)
        received = [padded[place] if flat is None else flat for place, flat in enumerate(held)]
        for axis in self._copied:
            # From the owner's copy to the others; those with the owner's coordinate along the axes that follow.
            later = self._copied[self._copied.index(axis) + 1 :]
            group = self._mesh.get_group(axis)
            works = [
                dist.broadcast(flat, group=group, group_src=owner[axis], async_op=True)
                for flat, owner in zip(received, owners, strict=True)
                if self._takes_part(owner, later)
            ]
            _wait(works)
        return received

    def _joined(self, number: int, flat: Tensor) -> Tensor:
        """Return the whole matrix of its padded shards."""
        whole = flat.new_empty(self.shapes[number])
        shards = flat.view(len(self._parts[number]), -1)
        for part, shard in zip(self._parts[number], shards, strict=True):
            whole[part.slices] = shard[: math.prod(part.shape)].view(part.shape)
        return whole

    def _split(self, number: int, whole: Tensor) -> Tensor:
        """Return the padded shards of a whole matrix, one after the other."""
        shards = whole.new_zeros(len(self._parts[number]), self._largest(number))
        for part, shard in zip(self._parts[number], shards, strict=True):
            shard[: math.prod(part.shape)].copy_(whole[part.slices].reshape(-1))
        return shards.view(-1)


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
