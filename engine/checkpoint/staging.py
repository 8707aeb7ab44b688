"""A rank's part of every tensor, copied to host memory: what a checkpoint is written from while training goes on.

Weights and optimizer states change in one place of a step, the update. So the copies are made behind the next step's
forward and backward passes, and only its update waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Buffers in host memory, pinned where tensors are on a GPU; made once and kept for the next checkpoint.

    After :meth:`begin`, the thread that writes calls :meth:`copy`, and who is to change the tensors
    :meth:`hold_update`.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._on_host: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[torch.cuda.Event] = []
        self._host_copied = threading.Event()
        self._host_copied.set()

    @torch.no_grad()
    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Take note of the values that this rank holds of each tensor now, by name. Copies from a GPU are begun."""
        self._on_host, self._copied = {}, []
        self._host_copied.clear()
        for name, tensor in tensors.items():
            held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (held.shape, held.dtype):
                buffer = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.is_cuda)
                self._buffers[name] = buffer
            if held.is_cuda:
                with torch.cuda.stream(self._stream(held.device)):
                    buffer.copy_(held, non_blocking=True)
            else:
                self._on_host[name] = held
        self._copied = [stream.record_event() for stream in self._streams.values()]

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of copies from ``device``, after what the device has been told to do up to now."""
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    @torch.no_grad()
    def copy(self) -> Mapping[str, Tensor]:
        """The values as they were, by name, on the CPU; until the next :meth:`begin`. Waits for the copies."""
        try:
            for name, held in self._on_host.items():
                self._buffers[name].copy_(held)
        finally:
            self._on_host = {}
            self._host_copied.set()
        for event in self._copied:
            event.synchronize()
        return self._buffers

    def hold_update(self) -> None:
        """Let what comes now change the tensors only after they have been copied. Does not wait for a GPU."""
        self._host_copied.wait()
        for event in self._copied:
            event.wait()
        self._copied = []
