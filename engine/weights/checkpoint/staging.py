"""Copy a rank's part of every tensor to host memory, from which a checkpoint is written during training.

Weights and optimizer states change only in the update of a step. So they are copied during the forward and backward
passes of the next step, and only its update waits for the copies.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import UserError
from ...optim.local import local_part
from .slabs import plan_slabs


class Staging:
    """Buffers in host memory, pinned if tensors are on a GPU; allocated once and reused for the next checkpoint.

    After :meth:`begin`, the writing thread calls :meth:`copy`, and the training calls :meth:`hold_update` before it
    changes tensors.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._on_host: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[torch.cuda.Event] = []
        self._host_copied = threading.Event()
        self._host_copied.set()

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate memory for copies of ``tensors``, unless it is allocated already.

        Raises:
            UserError: there is too little.
        """
        held = {name: local_part(tensor) for name, tensor in tensors.items()}
        if {name: _form(tensor) for name, tensor in held.items()} == {n: _form(b) for n, b in self._buffers.items()}:
            return
        self._buffers = {}  # freed before others are allocated
        try:
            for on_gpu in (False, True):
                self._buffers |= _allocate(
                    {n: tensor for n, tensor in held.items() if tensor.is_cuda == on_gpu}, on_gpu
                )
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"checkpoint.asynchronous: no host memory for copies of weights and states ({error}); set it to false, "
                "or use more nodes"
            ) from None

    @torch.no_grad()
    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy this rank's present values of each tensor. Only copies from a GPU are made now."""
        self.reserve(tensors)
        self._on_host, self._copied = {}, []
        self._host_copied.clear()
        on_devices: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in tensors.items():
            held = local_part(tensor)
            if held.is_cuda:
                on_devices.setdefault(held.device, []).append((self._buffers[name], held))
            else:
                self._on_host[name] = held
        for device, pairs in on_devices.items():
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for buffer, held in pairs:
                    buffer.copy_(held, non_blocking=True)
            self._copied.append(stream.record_event())

    @torch.no_grad()
    def copy(self) -> Mapping[str, Tensor]:
        """Return the copied values by name, on the CPU, valid until the next :meth:`begin`. Waits for the copies."""
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
        """Make later changes of the tensors happen after they have been copied. Does not wait for a GPU."""
        self._host_copied.wait()
        for event in self._copied:
            event.wait()
        self._copied = []


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _allocate(tensors: Mapping[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """Return a buffer on the host for each tensor."""
    plan = plan_slabs([tensor.nbytes for tensor in tensors.values()])
    slabs = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for size in plan.slab_bytes]
    return {
        name: slabs[slab][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), (slab, start) in zip(tensors.items(), plan.places, strict=True)
    }
