"""Simulate one rank of an absent cluster: a process group that sends nothing, and tensors without values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from ...engine.model.language_model import LanguageModel
from ...engine.parallel.build import Materialize
from ...engine.parallel.process_group import Ranks, Result

CPU = torch.device("cpu")


class SimulatedRanks(Ranks):
    """Ranks which all return the same values as this one."""

    def all_reduce(self, value: float) -> float:
        """See :class:`~retemper.engine.parallel.process_group.Ranks`."""
        return value * self.world_size

    def broadcast(self, value: Any) -> Any:
        """See :class:`~retemper.engine.parallel.process_group.Ranks`."""
        return value

    def fail_together(self, action: Callable[[], Result]) -> Result:
        """See :class:`~retemper.engine.parallel.process_group.Ranks`."""
        return action()

    def raise_on_all(self, problem: str | None) -> None:
        """See :class:`~retemper.engine.parallel.process_group.Ranks`."""
        assert problem is None


@contextlib.contextmanager
def simulated_cluster(world_size: int, rank: int) -> Iterator[SimulatedRanks]:
    """Act as ``rank`` of ``world_size`` in a process group that sends nothing; tensors made inside have no values.

    They are nominally on the CPU: without a GPU, PyTorch cannot make CUDA tensors that take part in autograd.
    """
    # Registers the backend "fake", and the effect of collectives on tensors without values.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield SimulatedRanks(rank, world_size, CPU)
    finally:
        dist.destroy_process_group()
        _clear_dtensor_caches()


def has_values() -> bool:
    """Return whether tensors that are made now have values."""
    return _fake_mode() is None


def materialize_without_values() -> Materialize:
    """Return a function that allocates the tensors of a model without values, even where others have values."""
    fake_mode = _fake_mode()

    def materialize(model: LanguageModel, device: torch.device, weights_device: torch.device) -> None:
        with fake_mode:
            model.to_empty(device=weights_device)  # constants need no values either

    return materialize


def _fake_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _clear_dtensor_caches() -> None:
    """Empty DTensor's caches: meshes of equal ranks are equal, but the next one has process groups of other names."""
    from torch.distributed.tensor import _redistribute, _sharding_prop, debug

    for name in ("_clear_sharding_prop_cache", "_clear_python_sharding_prop_cache"):
        if hasattr(debug, name):
            getattr(debug, name)()
            break
    for owner in (_redistribute, _sharding_prop.ShardingPropagator):
        for value in vars(owner).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a class or module that has no interface for it, and restore them.

    Only for PyTorch's own classes and for kernels: the engine has interfaces for what a dry run changes. The callers
    say why each replacement is necessary.
    """
    originals = {name: vars(owner)[name] for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)
