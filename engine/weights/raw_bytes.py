"""Read and write bytes of CPU tensors at places in files. Nothing is mapped, so that memory stays bounded."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files.regular import open_regular

MAX_CALL_BYTES = 1 << 30
"""Limit of one system call; Linux moves at most 2 GiB in a call."""


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU ``tensor``; writing to it changes the tensor."""
    assert tensor.is_contiguous()
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@contextmanager
def opened_for_reading(path: Path) -> Iterator[int]:
    """Yield a file descriptor of ``path``.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    with file:
        yield file.fileno()


def read_exactly(descriptor: int, offset: int, into: Tensor, path: Path) -> None:
    """Fill the contiguous tensor ``into`` with the bytes at ``offset``; ``path`` names the file in errors.

    Raises:
        UserError: the file cannot be read, or ends too early.
    """
    read_into(descriptor, offset, bytes_of(into), path)


def read_into(descriptor: int, offset: int, rest: memoryview, path: Path) -> None:
    """As :func:`read_exactly`, into memory."""
    while rest:
        try:
            count = os.preadv(descriptor, [rest[:MAX_CALL_BYTES]], offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if count == 0:
            raise UserError(
                f"{path}: ends before byte {offset + len(rest):,}; it was truncated while in use, fetch it again"
            )
        rest, offset = rest[count:], offset + count


def read_box(
    descriptor: int, start: int, shape: Sequence[int], offsets: Sequence[int], into: Tensor, path: Path
) -> None:
    """Fill the contiguous CPU tensor ``into`` with the box at ``offsets`` of a stored tensor, and read nothing else.

    Args:
        descriptor: of the file.
        start: byte at which the values of the stored tensor begin, row after row.
        shape: of the stored tensor.
        offsets: of the box's first element; its sizes are those of ``into``.
        path: names the file in errors.

    Raises:
        UserError: the file cannot be read, or ends too early.
    """
    strides = [math.prod(shape[axis + 1 :]) * into.dtype.itemsize for axis in range(len(shape))]
    start += sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    # Along the axes after the last one that is cut, elements of the box follow each other in the file.
    cut = max((axis for axis, length in enumerate(shape) if into.shape[axis] != length), default=0)
    values, run = bytes_of(into), math.prod(into.shape[cut:]) * into.dtype.itemsize
    for number, index in enumerate(itertools.product(*map(range, into.shape[:cut]))):
        at = start + sum(place * stride for place, stride in zip(index, strides, strict=False))
        read_into(descriptor, at, values[number * run : (number + 1) * run], path)


def write_exactly(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` at ``offset``.

    Raises:
        OSError: from the operating system.
    """
    while data:
        count = os.pwrite(descriptor, data[:MAX_CALL_BYTES], offset)
        data, offset = data[count:], offset + count
