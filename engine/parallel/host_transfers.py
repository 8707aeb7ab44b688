"""Move weights to the device and gradients to the host, for weights and an optimizer in host memory.

On a GPU all copies pass through pinned memory, which PyTorch reuses. Gradients are copied on a stream of their own
while the backward pass continues, and added on the host as they arrive. On a CPU the same code makes plain copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WAITING_BYTES = 2 * 1024**3
"""Gradients on their way to the host, at most; the backward pass then waits for the oldest of them."""


class HostTransfers:
    """The transfers of one model between a device and the host.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._waiting: deque[tuple[torch.cuda.Event | None, Tensor, Callable[[Tensor], None]]] = deque()
        self._waiting_bytes = 0

    @torch.no_grad()
    def send(self, copies: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Write ``weights``, on the host, into ``copies`` on the device, which may have another dtype.

        The host casts, so that no more bytes than necessary are transferred.
        """
        self._waiting.clear()  # of a step that has failed
        self._waiting_bytes = 0
        for copy, weight in zip(copies, weights, strict=True):
            source = self._pinned(weight, copy.dtype) if self._on_gpu else weight
            copy.copy_(source, non_blocking=True)

    @torch.no_grad()
    def fetch(self, gradient: Tensor, add: Callable[[Tensor], None]) -> None:
        """Copy ``gradient`` to the host, and call ``add`` with the copy when it has arrived.

        Gradients are added in the order of the calls, the last ones in :meth:`finish`.
        """
        if self._stream is None:
            self._enqueue(None, gradient.clone(), add)
            return
        arrived = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            arrived.copy_(gradient, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        gradient.record_stream(self._stream)  # its memory is not reused before it has been copied
        self._enqueue(event, arrived, add)

    def finish(self) -> None:
        """Add all gradients that were fetched. Waits for the device."""
        while self._waiting:
            self._add_oldest()

    def _enqueue(self, event: torch.cuda.Event | None, arrived: Tensor, add: Callable[[Tensor], None]) -> None:
        self._waiting.append((event, arrived, add))
        self._waiting_bytes += arrived.nbytes
        while self._waiting and (self._waiting_bytes > _WAITING_BYTES or _is_done(self._waiting[0][0])):
            self._add_oldest()

    @torch.no_grad()
    def _add_oldest(self) -> None:
        event, arrived, add = self._waiting.popleft()
        self._waiting_bytes -= arrived.nbytes
        if event is not None:
            event.synchronize()
        add(arrived)

    @staticmethod
    def _pinned(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(weight.shape, dtype=dtype, pin_memory=True).copy_(weight)


def _is_done(event: torch.cuda.Event | None) -> bool:
    return event is not None and event.query()
