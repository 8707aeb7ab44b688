"""Read numbers from the device later, when they have arrived, instead of waiting for the device at once."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of some numbers in host memory, which a GPU makes when it reaches this point of its queue.

    Args:
        numbers: [...] on any device.
    """

    def __init__(self, numbers: Tensor):
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._copy.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))
        else:
            self._copy = numbers.detach().clone()

    def wait(self) -> list[float]:
        """Return the numbers. Waits for a GPU until it has made the copy, and no longer."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
