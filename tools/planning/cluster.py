"""Simulate one rank of an absent cluster: a process group that sends nothing, and tensors without values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from ...engine.parallel.process_group import Ranks, Result

CPU = torch.device("cpu")


class OneOfMany(Ranks):
    """A rank whose peers would all return the same values as this rank."""

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
def absent_cluster(world_size: int, rank: int) -> Iterator[OneOfMany]:
    """Act as ``rank`` of ``world_size`` in a process group that sends nothing; tensors made inside have no values.

    They are nominally on the CPU: without a GPU PyTorch cannot make CUDA tensors that take part in autograd, even
    without
    values.
    """
    # Registers the backend "fake", and the effect of collectives on tensors without values.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with _meshes_have_values(), FakeTensorMode(allow_non_fake_inputs=True):
            yield OneOfMany(rank, world_size, CPU)
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Empty DTensor's caches: equal ranks make equal meshes, so entries of one mesh would be used for the next one.

    Its process groups have other names."""
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
def without_values_from_materializing_on() -> Iterator[None]:
    """Let meshes have values, and models be built on the meta device, but let ``to_empty`` make tensors without
    values."""
    fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    to_empty = nn.Module.to_empty

    def to_empty_without_values(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with fake_mode if fake_mode is not None else contextlib.nullcontext():
            return to_empty(module, *args, **kwargs)

    with unset_fake_temporarily(), mock.patch.object(nn.Module, "to_empty", to_empty_without_values):
        yield


@contextlib.contextmanager
def _meshes_have_values() -> Iterator[None]:
    """Let device meshes compute their tables of ranks with real tensors."""
    names = [name for name in ("__init__", "_concatenate", "__getitem__", "_flatten") if hasattr(DeviceMesh, name)]
    originals = {name: DeviceMesh.__dict__[name] for name in names}
    try:
        for name, original in originals.items():
            setattr(DeviceMesh, name, _with_values(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(DeviceMesh, name, original)


def _with_values(original: Any) -> Any:
    function = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return type(original)(call) if isinstance(original, (staticmethod, classmethod)) else call
