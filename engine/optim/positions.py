"""Positions of the elements of this rank's shard in the whole parameter, on which random streams depend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .local import local_part


def row_positions(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the elements of this rank's shard are in the whole parameter, which may be sharded in any way.

    The position of an element is the number of its row plus the number of its column.

    Args:
        parameter: [d0, ..., dn], whole or a DTensor.

    Returns:
        [rows] int64 and [columns] int64, on the shard's device; the shard has shape [..., columns], and rows in all.
    """
    local = local_part(parameter)
    offset: tuple[int, ...] = (0,) * parameter.ndim
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    rows = torch.zeros(1, dtype=torch.int64, device=local.device)
    columns = torch.zeros(1, dtype=torch.int64, device=local.device)
    for dim, size in enumerate(local.shape):
        along = (offset[dim] + torch.arange(size, device=local.device)) * math.prod(parameter.shape[dim + 1 :])
        if dim == parameter.ndim - 1:
            columns = along
        else:
            rows = (rows[:, None] + along).flatten()
    return rows, columns


def row_chunks(parameter: Tensor, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows of this rank's shard of about ``elements`` each, and the [rows, columns] int64 positions
    of their elements.
    """
    rows, columns = row_positions(parameter)
    size = max(1, elements // max(1, len(columns)))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        if len(columns):
            yield slice(start, start + size), some[:, None] + columns
