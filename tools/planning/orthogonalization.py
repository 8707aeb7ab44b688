"""The products of Muon in a plan: the matrices that a rank orthogonalizes, and the operations that ranks wait for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from ...engine.optim import TrainingOptimizer
from ...engine.optim.base import CombinedOptimizer
from ...engine.optim.muon import Muon


class Matrix(NamedTuple):
    """A matrix, or a stack of them, that Muon orthogonalizes in a step."""

    flops: float
    exchange: int | None
    """Number of the exchange that brings it to one rank; None: each rank that has it computes it whole."""
    ranks: int
    """Ranks that get one matrix each in a round of the exchange."""


Matrices = tuple[tuple[Matrix, ...], ...]
"""Those of each block of a rank, and last all others."""


def matrices_of(optimizer: TrainingOptimizer, blocks: Iterable[nn.Module]) -> Matrices:
    """Return the matrices that ``optimizer`` orthogonalizes; only empty tuples without Muon."""
    places = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
    found: list[list[Matrix]] = [[] for _ in range(max(places.values(), default=-1) + 2)]
    exchanges: dict[Hashable, int] = {}
    for part in optimizer.parts if isinstance(optimizer, CombinedOptimizer) else [optimizer]:
        for one in part.orthogonalizations() if isinstance(part, Muon) else ():
            exchange = None if one.exchange is None else exchanges.setdefault(one.exchange, len(exchanges))
            found[places.get(id(one.parameter), -1)].append(Matrix(one.flops, exchange, one.ranks))
    return tuple(map(tuple, found))


def waited_flops(matrices: Matrices, on_host: bool) -> float:
    """Return the operations of the products of a step for which every rank waits.

    In a round of an exchange each rank has one matrix, and all wait for the largest.

    Args:
        matrices: of the rank.
        on_host: weights are in host memory; what is not exchanged is computed there, and not counted.
    """
    exchanged: defaultdict[int, list[Matrix]] = defaultdict(list)
    total = 0.0
    for matrix in (one for group in matrices for one in group):
        if matrix.exchange is not None:
            exchanged[matrix.exchange].append(matrix)
        elif not on_host:
            total += matrix.flops
    return total + sum(_of_rounds(some) for some in exchanged.values())


def on_the_host(matrices: Matrices) -> bool:
    """Return whether some matrices are not exchanged: with weights in host memory, the host computes them."""
    return any(one.exchange is None for group in matrices for one in group)


def _of_rounds(matrices: Sequence[Matrix]) -> float:
    size = matrices[0].ranks
    rounds = (matrices[start : start + size] for start in range(0, len(matrices), size))
    return sum(max(one.flops for one in some) for some in rounds)
