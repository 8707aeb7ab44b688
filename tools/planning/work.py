"""Count the work of a rank in a step: floating-point operations, and bytes sent, by kind and axis."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...engine.parallel import ring
from ...engine.parallel.layout import Layout
from ...kernels import grouped_linear as _operators  # noqa: F401 - registers them

_KINDS = {
    "all-gather": ("allgather", "all_gather"),
    "reduce-scatter": ("reduce_scatter",),
    "all-reduce": ("allreduce", "all_reduce"),
    "all-to-all": ("alltoall", "all_to_all"),
    "broadcast": ("broadcast",),
    "send": ("send",),
}
"""Collectives by parts of their operators' names. Receives are not counted, because another rank counts them as
sent."""
_NAMESPACES = ("c10d", "c10d_functional", "_c10d_functional", "_dtensor")


_GROUPED = (
    *(getattr(torch.ops.aten, name) for name in ("_grouped_mm", "_scaled_grouped_mm") if hasattr(torch.ops.aten, name)),
    torch.ops.retemper.grouped_linear,
    torch.ops.retemper.grouped_linear_weight_gradient,
)
_RING = (torch.ops.retemper.ring_attention, torch.ops.retemper.ring_attention_backward)
_BAGS = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)
"""Sums of rows."""


class ExpertWork(NamedTuple):
    """What experts add to the time of a rank beyond operations, which are counted with all others."""

    flops: float = 0.0
    """Floating-point operations of the grouped products, which are also in the sum of all."""
    bytes: float = 0.0
    """Bytes of the factors and results of the grouped products. Each expert of the rank is read, if every expert has
    rows."""
    moved: float = 0.0
    """Bytes that are read and written to sort rows by expert, and to sum the rows of a token."""

    def __add__(self, other: Any) -> ExpertWork:
        return ExpertWork(*(a + b for a, b in zip(self, other, strict=True)))


NO_EXPERTS = ExpertWork()


class Collective(NamedTuple):
    """The key of one kind of collective."""

    kind: str
    axes: tuple[str, ...]
    """The axes of the mesh along which the ranks of the group differ."""
    ranks: int
    per_node: int
    """Number of the group's ranks in one node."""


@dataclass
class CollectiveTotal:
    """All collectives of one kind."""

    count: int = 0
    size: float = 0.0
    """Bytes of the whole tensors."""
    sent: float = 0.0
    """Bytes that this rank sends, by a ring."""


@dataclass
class WorkCounter:
    """Counts the operators of one rank; pass it to :class:`~retemper.tools.planning.memory.MemoryCounter`.

    Args:
        layout: of the ranks.
        gpus_per_node: consecutive ranks are in one node.
        document_length: tokens of each document, for the operations of attention.
        expert: see below.
    """

    layout: Layout
    gpus_per_node: int
    document_length: int
    expert: int = 1
    """``parallel.expert``: groups along these ranks get the names ``expert`` and ``expert_shard``."""
    flops: float = 0.0
    experts: ExpertWork = NO_EXPERTS
    collectives: dict[Collective, CollectiveTotal] = field(default_factory=dict)

    def add_flops(self, count: float) -> None:
        """Count floating-point operations that no operator shows."""
        self.flops += count

    def count_operator(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operator."""
        packet = getattr(operator, "_overloadpacket", None)
        if operator.namespace == "torch_attn":
            self._count_attention(operator, args)
        elif packet in _RING:
            self._count_ring(operator, args)
        elif packet in _GROUPED:
            self._count_grouped(args[0], args[1], result)
        elif packet == torch.ops.aten.index and args[0].is_floating_point() and args[0].dim() == 2:
            self.experts += ExpertWork(moved=2 * _bytes(result))
        elif packet in _BAGS:
            self.experts += ExpertWork(moved=_bytes(args[0]) + _bytes(result[0]))
        elif packet in flop_registry:
            # PyTorch counts all pairs of positions; attention is causal, and its kernels skip half of them.
            share = 0.5 if "attention" in operator._schema.name else 1
            self.flops += share * flop_registry[packet](*args, **kwargs, out_val=result)
        elif operator.namespace in _NAMESPACES:
            self._count_collective(operator, args, kwargs, result)

    def _count_grouped(self, one: Tensor, other: Tensor, result: Tensor) -> None:
        flops = _grouped_flops(one, other, result)
        self.flops += flops
        self.experts += ExpertWork(flops, _bytes((one, other, result)))

    def _count_attention(self, operator: Any, args: Any) -> None:
        # q @ k and p @ v forward; backward these again and four more products, less one (Dao, 2023,
        # https://arxiv.org/abs/2307.08691): half of all pairs, as attention is causal.
        backward = "backward" in operator._schema.name
        query = args[1] if backward else args[0]
        tokens, heads, head_dim = query.shape
        products = 5 if backward else 2
        self.flops += products * 2 * heads * head_dim * tokens * self.document_length / 2

    def _count_ring(self, operator: Any, args: Any) -> None:
        """Count what :mod:`retemper.engine.parallel.ring` does and sends. Windows are not counted, as elsewhere."""
        backward = "backward" in operator._schema.name
        query, key, value = args[1:4] if backward else args[:3]
        offsets, name = args[6:8] if backward else args[4:6]
        group = dist.distributed_c10d._resolve_process_group(name)
        with unset_fake_temporarily():
            edges = offsets.tolist()
        lengths = tuple(stop - start for start, stop in itertools.pairwise(edges))
        steps = ring.plan_ring(lengths, group.rank(), group.size(), None)
        pairs = sum(block.num_pairs for blocks in steps for block in blocks)
        self.flops += (5 if backward else 2) * 2 * query.shape[1] * query.shape[2] * pairs
        pair, ranks = key.numel() + value.numel(), group.size()
        self._add("send", dist.get_process_group_ranks(group), pair * key.element_size(), ranks - 1)
        if backward:
            self._add("send", dist.get_process_group_ranks(group), 4 * pair, ranks)

    def _count_collective(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = operator._schema.name.partition("::")[2]
        kind = next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), None)
        if kind is None:
            return
        group = _group_of((*args, *kwargs.values()))
        size = max(_bytes(value) for value in (*args, result))
        self._add(kind, dist.get_process_group_ranks(group), size, 1)

    def _add(self, kind: str, ranks: list[int], size: float, count: int) -> None:
        nodes = Counter(rank // self.gpus_per_node for rank in ranks)
        key = Collective(kind, self._expert_axes(kind, ranks) or self._axes(ranks), len(ranks), max(nodes.values()))
        entry = self.collectives.setdefault(key, CollectiveTotal())
        entry.count += count
        entry.size += count * size
        entry.sent += count * sent_bytes(kind, size, len(ranks))

    def _axes(self, ranks: Iterable[int]) -> tuple[str, ...]:
        return _differing(ranks, self.layout._asdict())

    def _expert_axes(self, kind: str, ranks: Sequence[int]) -> tuple[str, ...]:
        """Return the axis of a group that exists because ranks share experts; nothing for others."""
        sharing = self.layout.shard * self.layout.context
        if self.expert == 1 or len(ranks) == 1 or kind == "send":
            return ()
        sizes = {"pipeline": self.layout.pipeline, "replicate": self.layout.replicate}
        sizes |= {"expert_shard": sharing // self.expert, "expert": self.expert, "tensor": self.layout.tensor}
        axes = _differing(ranks, sizes)
        if axes not in (("expert",), ("expert_shard",)) or len(ranks) != sizes[axes[0]]:
            return ()
        return axes if len(ranks) < sharing or kind == "all-to-all" else ()


def _differing(ranks: Iterable[int], sizes: dict[str, int]) -> tuple[str, ...]:
    """Return the axes along which ``ranks`` differ, of a mesh with axes of these sizes, outermost first."""
    places = []
    for rank in ranks:
        place = []
        for size in reversed(sizes.values()):
            rank, index = divmod(rank, size)
            place.append(index)
        places.append(place[::-1])
    return tuple(axis for axis, indices in zip(sizes, zip(*places, strict=True), strict=True) if len(set(indices)) > 1)


def hidden_bytes(operator: Any, args: Any) -> int:
    """Return the bytes that an operator holds while it runs, besides its arguments and results, if it is known."""
    packet = getattr(operator, "_overloadpacket", None)
    if packet not in _RING:
        return 0
    backward = packet is _RING[1]
    query, key, value = args[1:4] if backward else args[:3]
    return ring.scratch_bytes(query, key, value, backward)


def _grouped_flops(one: Tensor, other: Tensor, result: Tensor) -> float:
    """Return the operations of products of matrices in groups of rows (or columns) of unequal size.

    Every row of a matrix of rows is multiplied by one matrix. If the result has a matrix for each group, the groups
    divide the dimension of the sum.
    """
    if result.dim() == 3 and one.dim() == other.dim() == 2:
        return 2.0 * one.shape[0] * one.shape[1] * other.shape[1]
    return 2.0 * result.numel() * one.shape[-1]


def sent_bytes(kind: str, size: float, ranks: int) -> float:
    """Return the bytes that each rank sends for a tensor of ``size`` bytes by a ring, which is the minimum.

    See Patarasuk and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002.
    """
    if kind in ("send", "broadcast"):
        return size if ranks > 1 else 0.0
    return size * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _group_of(values: Iterable[Any]) -> dist.ProcessGroup:
    for value in values:
        if isinstance(value, dist.ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    name = [value for value in values if isinstance(value, str)][-1]
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
