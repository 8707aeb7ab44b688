"""Define the interface of a conversion's input: reads any rows of any tensor into memory of the caller.

A row is an index of the first dimension; a scalar is one row. Reading rows in blocks needs no more memory than a block,
however large the tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of one tensor on the disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


ReadRows = Callable[[int, Tensor], None]
"""``read(first, rows)`` fills the contiguous CPU tensor ``rows``, of the stored dtype and shape [n, ...], with the rows
from ``first`` on."""


class TensorSource(Protocol):
    """Tensors that can be read in parts, by several threads at once."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Names, shapes and dtypes."""

    def rows(self, name: str) -> AbstractContextManager[ReadRows]:
        """Return a context manager that yields the reader of the rows of ``name``."""


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``shape`` with a first dimension that counts rows."""
    return shape or (1,)


def read_blocks(source: TensorSource, name: str, block_bytes: int) -> Iterator[Tensor]:
    """Yield the rows of the tensor ``name`` from first to last, at most ``block_bytes`` at a time, or one row."""
    shape, dtype = rows_of(source.tensors[name].shape), source.tensors[name].dtype
    step = max(1, block_bytes // max(1, math.prod(shape[1:]) * dtype.itemsize))
    with source.rows(name) as read:
        for first in range(0, shape[0], step):
            block = torch.empty((min(step, shape[0] - first), *shape[1:]), dtype=dtype)
            read(first, block)
            yield block
