"""The operators that a rank runs, in their order."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EXCHANGE = "_c10d_functional::all_to_all_single"
_NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd", "send", "recv_")
"""Sends are not collectives of a group: each has its own receive."""


class Collective(NamedTuple):
    """A call of a group of ranks."""

    operator: str
    ranks: tuple[int, ...]
    tensors: tuple[str, ...]
    """Their dtypes and shapes; of an exchange, whose sizes differ between ranks, the dtype only."""


class Operators(TorchDispatchMode):
    """Remembers operators and collectives while it is active, those on the parts of DTensors as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        """How often each operator ran, by phase and name."""
        self.collectives: list[Collective] = []
        self._phase = ""

    def begin(self, phase: str) -> None:
        """Count what follows as this phase."""
        self._phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func.name().partition(".")[0]
        self.counts[self._phase][name] += 1
        namespace, _, operator = name.partition("::")
        if namespace in ("c10d", "_c10d_functional", "_dtensor") and operator not in _NO_COLLECTIVES:
            self.collectives.append(Collective(name, _ranks(args), _tensors(args, name == EXCHANGE)))
        return func(*args, **(kwargs or {}))


def _ranks(args: Any) -> tuple[int, ...]:
    """The ranks of the group: an argument is it, or the last string is its name."""
    group = None
    for value in tree_leaves(args):
        if isinstance(value, str) and value.isdigit():
            group = dist.distributed_c10d._resolve_process_group(value)
        elif isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            group = dist.ProcessGroup.unbox(value)
    return tuple(dist.get_process_group_ranks(group))


def _tensors(args: Any, sizes_differ: bool) -> tuple[str, ...]:
    tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
    return tuple(str(value.dtype) if sizes_differ else f"{value.dtype} {tuple(value.shape)}" for value in tensors)
