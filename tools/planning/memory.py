"""Count live memory by kind, exactly: every storage that an operator makes, from its creation to its release.

Works on real and on fake tensors. Memory that the counted program does not show is not included: workspaces inside of
kernels, buffers of the communication library, fragmentation of the allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

KINDS = (
    "parameters",
    "gradients",
    "optimizer states",
    "activations",
    "loss buffers",
    "communication buffers",
    "temporaries",
)
"""Purposes of memory. parameters, gradients, optimizer states: a rank's own share, kept between passes. activations:
everything made by forward and backward passes. loss buffers: of the linear cross-entropy. communication buffers:
gathered parameters, and full gradients before their reduction. temporaries: of clipping and of the optimizer."""

BLOCK_BYTES = 512
"""Sizes are rounded up to a multiple of this, as in PyTorch's CUDA allocator."""


class MemoryCounter(TorchDispatchMode):
    """Counts memory while it is active.

    ``bytes`` holds the current bytes by kind. For each ``moment`` that its user has named, ``peaks`` holds the bytes by
    kind at the peak of their sum, and ``most`` the maximum of each kind.

    Args:
        on_operator: called with (operator, arguments, keyword arguments, result) of every operator on plain tensors.
        block_bytes: sizes are rounded up to a multiple of it.
        hidden_bytes: called with (operator, arguments); returns the bytes that the operator holds only while it runs.
    """

    def __init__(
        self,
        on_operator: Callable[..., None] | None = None,
        block_bytes: int = BLOCK_BYTES,
        hidden_bytes: Callable[[Any, Any], int] = lambda *_: 0,
    ):
        super().__init__()
        self._on_operator, self._block, self._hidden_bytes = on_operator, block_bytes, hidden_bytes
        self._kind, self._paused = "activations", False
        self._live: dict[int, tuple[int, str]] = {}
        self.bytes: dict[str, float] = dict.fromkeys(KINDS, 0)
        self._total = 0
        self.moment = ""
        self.on_reduced: Callable[[], None] = lambda: None
        """Called after the backward pass of each group of parameters."""
        self.peaks: dict[str, dict[str, float]] = {}
        self.most: dict[str, dict[str, float]] = {"": dict(self.bytes)}
        self._peak_totals: dict[str, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor arrives as operators on its parts.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if self._paused:
            return result
        for value in tree_iter(result):
            # A wrapper, such as the result of a collective that has not been waited for, has no memory of its own.
            if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value):
                self._see(value)
        hidden = self._hidden_bytes(operator, args)
        if hidden:
            self._change(hidden, self._kind)
            self._change(-hidden, self._kind)
        if self._on_operator is not None:
            self._on_operator(operator, args, kwargs, result)
        return result

    def __enter__(self) -> MemoryCounter:
        self._resize = torch.UntypedStorage.resize_
        counter = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = counter._resize(storage, size)
            counter._resized(storage)
            return result

        # FSDP frees and allocates the memory of gathered parameters in this way.
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        return super().__exit__(*exception)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count storages made inside as this kind, unless an inner call changes it."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count anything inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def begin(self, kind: str) -> None:
        """Count storages made from now on as this kind."""
        self._kind = kind

    def declare(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Count the memory of ``tensors`` as this kind from now on, whatever it was made as, even if it was unknown."""
        for tensor in tensors:
            if tensor is None:
                continue
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._see(tensor)
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                size, before = self._live[key]
                self._live[key] = (size, kind)
                self.bytes[before] -= size
                self.bytes[kind] += size
                self._note_most(kind)

    def enter(self, moment: str) -> None:
        """Record peaks under ``moment`` from now on."""
        self.moment = moment
        self._note_peak()
        self.most.setdefault(moment, dict(self.bytes))
        for kind in KINDS:
            self._note_most(kind)

    def reset_peaks(self) -> None:
        """Discard the peaks until now."""
        self.peaks, self._peak_totals, self.most = {}, {}, {}
        self.enter(self.moment)

    @property
    def peak(self) -> dict[str, float]:
        """Return the highest of all peaks."""
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()))

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        weakref.finalize(storage, self._forget, key).atexit = False
        size = self._rounded(storage)
        self._live[key] = (size, self._kind)
        self._change(size, self._kind)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            size, kind = self._live[key]
            now = self._rounded(storage)
            self._live[key] = (now, kind)
            self._change(now - size, kind)

    def _forget(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self._change(-size, kind)

    def _change(self, size: int, kind: str) -> None:
        self.bytes[kind] += size
        self._total += size
        if size > 0:
            self._note_most(kind)
            self._note_peak()

    def _note_peak(self) -> None:
        if self._total > self._peak_totals.get(self.moment, -1):
            self._peak_totals[self.moment] = self._total
            self.peaks[self.moment] = dict(self.bytes)

    def _note_most(self, kind: str) -> None:
        most = self.most[self.moment]
        most[kind] = max(most[kind], self.bytes[kind])

    def _rounded(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block
