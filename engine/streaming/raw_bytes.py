"""Read and write bytes of CPU tensors at places in files. Nothing is mapped, so that memory stays bounded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..regular_files import open_regular

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
    rest = bytes_of(into)
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


def write_exactly(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` at ``offset``.

    Raises:
        OSError: from the operating system.
    """
    while data:
        count = os.pwrite(descriptor, data[:MAX_CALL_BYTES], offset)
        data, offset = data[count:], offset + count
