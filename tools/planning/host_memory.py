"""Host memory that offload needs: weights, gradients and optimizer states of the ranks of a node, and activations.

A GPU copies to and from pinned memory. PyTorch reserves it in powers of two (``ATen/core/CachingHostAllocator.h``), so
a pinned tensor takes up to twice its size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ...engine.config.settings import RunConfig
from ...engine.model.language_model import LanguageModel
from ...engine.optim.local import local_part


class HostActivations:
    """Counts the activations that a rank keeps in host memory."""

    def __init__(self) -> None:
        self.sent = 0.0
        """Bytes sent there."""
        self.most = 0.0
        """Bytes of pinned memory that they take at the same time, at most."""
        self._now = 0.0

    def add(self, copy: Tensor) -> None:
        """Count a copy in host memory until it is released."""
        size = copy.untyped_storage().nbytes()
        self.sent += size
        self._change(pinned_bytes(size))
        weakref.finalize(copy.untyped_storage(), self._change, -pinned_bytes(size)).atexit = False

    def reset(self) -> None:
        """Count from now on."""
        self.sent, self.most = 0.0, self._now

    def _change(self, size: float) -> None:
        self._now += size
        self.most = max(self.most, self._now)


def pinned_bytes(size: int) -> int:
    """Return the bytes that PyTorch reserves for a tensor of ``size`` bytes in pinned memory."""
    return 1 << (size - 1).bit_length() if size else 0


def pinned_rounding(models: Iterable[LanguageModel], config: RunConfig) -> float:
    """Return what pinned memory adds to the sizes of a rank's weights and gradients.

    FSDP2 pins both with ``cpu_offload: true``. A rank without FSDP2 has pinned buffers instead, which are not counted.
    """
    models = list(models)
    if config.parallel.cpu_offload is not True or not any(isinstance(one, FSDPModule) for one in models):
        return 0.0
    parameters = [parameter for model in models for parameter in model.parameters()]
    sizes = [local_part(one).nbytes for one in parameters] + [
        local_part(one).nbytes for one in parameters if one.requires_grad
    ]
    return float(sum(pinned_bytes(size) - size for size in sizes))
