"""Where the values of a conversion come from: any rows of any tensor, into memory that the caller owns.

A row is an index of the first dimension; a scalar is one row. Whoever reads rows in blocks needs no more memory than a
block, however large the tensor is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor

from .tensors import StoredTensor

ReadRows = Callable[[int, Tensor], None]
"""``read(first, rows)`` fills the contiguous CPU tensor ``rows``, of the stored dtype and shape [n, ...], with the rows
from ``first`` on."""


class TensorSource(Protocol):
    """Tensors that can be read in parts, by several threads at once."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Names, shapes and dtypes."""

    def rows(self, name: str) -> AbstractContextManager[ReadRows]:
        """What reads the rows of ``name`` while it is open."""


class WholeTensors:
    """A source out of a function that gives whole tensors, one of which is in memory at a time.

    Args:
        tensors: names, shapes and dtypes.
        read: gives the CPU tensor of a name.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], read: Callable[[str], Tensor]):
        self.tensors = tensors
        self._read = read
        self._turn = threading.Lock()

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """See :class:`TensorSource`."""
        with self._turn:
            tensor = self._read(name)
            described = self.tensors[name]
            assert (tuple(tensor.shape), tensor.dtype) == (described.shape, described.dtype), name
            tensor = tensor.reshape(rows_of(described.shape))

            def read(first: int, rows: Tensor) -> None:
                rows.copy_(tensor[first : first + rows.shape[0]])

            yield read


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with a first dimension to count rows by."""
    return shape or (1,)
