"""Keep the activations of blocks in host memory between their forward and their backward pass.

Autograd hands every tensor that it saves for the backward pass to a hook
(``torch.autograd.graph.saved_tensors_hooks``). The hook copies the tensor's memory to the host, once for all tensors
that share it, and the device frees it. On a GPU the copies are made on a stream of their own, while the next block
computes; at most two blocks are on their way. In the backward pass, the activations of a block are copied back while
the block after it computes. Computing does not change, so neither do the results.

Parameters, the inputs that all blocks share, and the activations of the last block, whose backward pass comes first,
stay on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter

from ..config.settings import RunConfig
from ..errors import UserError
from ..model.language_model import LanguageModel
from ..optim.local import local_part

MIN_BYTES = 64 * 1024
"""Smaller memory stays on the device: a copy would take as long as one of this size."""
_KEPT_BLOCKS = 1
_BLOCKS_ON_THEIR_WAY = 2


def check(config: RunConfig) -> None:
    """Refuse settings that do not work with offloaded activations.

    Raises:
        UserError: names the other setting.
    """
    parallel = config.parallel
    if not parallel.offload_activations:
        return
    if parallel.recompute == "selective":
        raise UserError(
            "parallel.offload_activations is true, but parallel.recompute is selective, which stores activations that "
            "autograd does not see; set parallel.recompute to none (all are offloaded) or full (the inputs of blocks)"
        )
    if parallel.pipeline_schedule.endswith("zero_bubble"):
        raise UserError(
            f"parallel.offload_activations is true, but parallel.pipeline_schedule {parallel.pipeline_schedule} needs "
            "activations twice; use interleaved_1f1b"
        )


def apply(model: LanguageModel, device: torch.device) -> None:
    """Offload what the blocks of ``model`` save, except for the last one. Call after recomputation and compilation."""
    blocks = model.blocks[:-_KEPT_BLOCKS]
    if not blocks:
        return
    offload = ActivationOffload(device)
    for block in blocks:
        block.forward = offload.wrapped(block, block.forward)
    model.register_forward_pre_hook(lambda *_: offload.begin())


@dataclass(eq=False)
class _Memory:
    """Memory that saved tensors use."""

    host: Tensor
    """[n] of the tensors' dtype."""
    on_device: Tensor | None = None


@dataclass(eq=False)
class _Saved:
    """The activations of a block in one forward pass."""

    earlier: _Saved | None
    """Those of the block before it."""
    memories: dict[int, _Memory] = field(default_factory=dict)
    leaving: list[Tensor] = field(default_factory=list)
    """Device memory that is being copied to the host."""
    left: torch.cuda.Event | None = None
    """When it has been copied."""
    returned: torch.cuda.Event | None = None
    """When it has been copied back."""
    is_back: bool = False


@dataclass(frozen=True, eq=False)
class _Place:
    """What autograd keeps instead of a saved tensor."""

    saved: _Saved
    memory: _Memory
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    rebuild: Callable[[Tensor], Tensor]


class ActivationOffload:
    """Moves what some blocks save between a device and the host.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device):
        self._device, self._on_gpu = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._last: _Saved | None = None
        self._leaving: deque[_Saved] = deque()
        self._back: _Saved | None = None
        self.sent_bytes = 0
        """Bytes copied to the host so far."""

    def begin(self) -> None:
        """Begin a forward pass of the model."""
        self._last = None
        if self._back is not None:
            _release(self._back)
            self._back = None

    def wrapped(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``forward`` of ``block``, with its saved tensors offloaded."""

        def offloaded(*arguments: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **named)
            saved = _Saved(self._last)
            self._last = saved
            # All but the hidden states.
            shared = (x for x in tree_iter((arguments[1:], named)) if isinstance(x, Tensor))
            stays = {_key(local_part(x)) for x in (*block.parameters(), *shared)}
            with saved_tensors_hooks(lambda x: self._pack(x, saved, stays), self._unpack):
                result = forward(*arguments, **named)
            self._depart(saved)
            return result

        return offloaded

    @torch.no_grad()
    def _pack(self, tensor: Tensor, saved: _Saved, stays: set[int]) -> Tensor | _Place:
        local, rebuild = _taken_apart(tensor)
        if local is None or local.device.type != self._device.type or local.dtype not in _FLOATS:
            return tensor
        storage, key = local.untyped_storage(), _key(local)
        if key in stays or storage.nbytes() < MIN_BYTES:
            return tensor
        if key not in saved.memories:
            whole = local.as_strided((storage.nbytes() // local.element_size(),), (1,), 0)
            saved.leaving.append(whole)  # its storage is not freed, and its key not used again, before all has left
            saved.memories[key] = _Memory(self._to_host(whole))
            self.sent_bytes += storage.nbytes()
        return _Place(saved, saved.memories[key], local.size(), local.stride(), int(local.storage_offset()), rebuild)

    def _to_host(self, whole: Tensor) -> Tensor:
        if self._stream is None:
            return whole.clone()
        host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(whole, non_blocking=True)
        return host

    def _depart(self, saved: _Saved) -> None:
        """Free the memory of the block that was computed before the last one."""
        if self._stream is not None:
            saved.left = torch.cuda.Event()
            saved.left.record(self._stream)
        self._leaving.append(saved)
        while len(self._leaving) > _BLOCKS_ON_THEIR_WAY:
            self._free(self._leaving.popleft())

    def _free(self, saved: _Saved) -> None:
        if saved.left is not None:
            # Later operators may use the memory again, and follow on this stream.
            torch.cuda.current_stream(self._device).wait_event(saved.left)
        saved.leaving.clear()

    @torch.no_grad()
    def _unpack(self, packed: Tensor | _Place) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        saved = packed.saved
        if self._back is not saved:  # the first tensor of this block
            while self._leaving:
                self._free(self._leaving.popleft())
            if self._back is not None:
                _release(self._back)
            self._back = saved
            self._bring_back(saved)
            if saved.earlier is not None:
                self._bring_back(saved.earlier)
        if saved.returned is not None:
            torch.cuda.current_stream(self._device).wait_event(saved.returned)
        assert packed.memory.on_device is not None
        return packed.rebuild(packed.memory.on_device.as_strided(packed.size, packed.stride, packed.offset))

    def _bring_back(self, saved: _Saved) -> None:
        """Begin to copy the activations of a block to the device."""
        if saved.is_back:
            return
        saved.is_back = True
        # Allocated for the stream that uses the memory; what that has to do first is also what the copies wait for.
        for memory in saved.memories.values():
            memory.on_device = torch.empty_like(memory.host, device=self._device)
        if self._stream is None:
            for memory in saved.memories.values():
                memory.on_device.copy_(memory.host)  # type: ignore[union-attr]
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for memory in saved.memories.values():
                memory.on_device.copy_(memory.host, non_blocking=True)  # type: ignore[union-attr]
            saved.returned = torch.cuda.Event()
            saved.returned.record(self._stream)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _release(saved: _Saved) -> None:
    """Free the device memory of a block whose backward pass is over."""
    saved.is_back = False
    for memory in saved.memories.values():
        memory.on_device = None


def _key(local: Tensor) -> int:
    return local.untyped_storage()._cdata


def _taken_apart(tensor: Tensor) -> tuple[Tensor | None, Callable[[Tensor], Tensor]]:
    """Return this rank's part of a tensor and how to make the tensor of it; None for other kinds of tensors."""
    if isinstance(tensor, DTensor):
        mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()

        def rebuild(local: Tensor) -> Tensor:
            return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

        return tensor.to_local().detach(), rebuild
    if type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, torch._subclasses.FakeTensor):
        return None, _unchanged
    return tensor.detach(), _unchanged


def _unchanged(local: Tensor) -> Tensor:
    return local
