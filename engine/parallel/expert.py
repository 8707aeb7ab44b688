"""Expert parallelism: ranks share the experts of a mixture, and exchange tokens instead of gathering all experts.

The experts are divided among the ranks of the mesh axis ``expert``. Each rank routes its own tokens, sends every row to
the rank of its expert, computes the rows that it receives, and returns the results (Lepikhin et al., 2020,
https://arxiv.org/abs/2006.16668). No row is dropped or padded: the ranks first exchange how many rows each sends. The
sizes of the exchange are needed on the host, so the host waits for the device once in each layer and pass.

Shapes: T tokens, K experts of a token, R = T * K rows, S rows that a rank receives, H hidden, N ranks, L experts of a
rank, E = N * L experts.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from ...kernels.token_permutation import (
    combine,
    expand,
    order_by_expert,
    sort_rows,
    unsort_rows,
    weights_of_rows,
)
from ..config.settings import ParallelConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.experts import Compute, Experts, GroupedLinear, Routing
from ..model.families import DecoderArchitecture
from ..model.language_model import LanguageModel


def check(architecture: Architecture, config: ParallelConfig) -> None:
    """Refuse ``parallel.expert`` for a model without experts, and a number that does not divide them.

    Raises:
        UserError: with both sides of the division.
    """
    size = config.expert
    if size == 1:
        return
    if not isinstance(architecture, DecoderArchitecture):
        raise UserError(
            f"parallel.expert is {size}, but model_type {architecture.model_type} is computed by "
            f"{architecture.describe_implementation()}; set it to 1 and use parallel.shard"
        )
    if architecture.experts is None:
        raise UserError(
            f"parallel.expert is {size}, but model_type {architecture.model_type} has no experts; set it to 1"
        )
    count = architecture.experts.num_experts
    if count % size:
        raise UserError(f"parallel.expert {size} does not divide the model's {count} experts; use a divisor of {count}")


def experts_of(model: nn.Module) -> list[Experts]:
    """Return the experts in ``model``, those of each layer as one module."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def apply(model: LanguageModel, mesh: DeviceMesh | None) -> None:
    """Keep this rank's experts of ``model`` (on the meta device), and exchange tokens with the ranks of the others.

    Call this after tensor parallelism, whose division of each expert is kept.

    Args:
        model: whole, or the layers of a stage.
        mesh: with the axes ``expert`` and ``tensor``; None if no ranks share experts.
    """
    if mesh is None:
        return
    group = mesh.get_group("expert")
    for experts in experts_of(model):
        for linear in experts.modules():
            if isinstance(linear, GroupedLinear):
                linear.weight = _part(linear.weight, mesh)
        experts.dispatch = functools.partial(_dispatch, group, experts.num_experts)


def _part(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """Return the rows of this rank's experts of a parameter [E, out, in], which may be split over tensor ranks."""
    places: list[Placement] = [Shard(0)]
    axes, local = mesh["expert"], weight.detach()
    if isinstance(local, DTensor):
        axes, places, local = mesh["expert", "tensor"], [Shard(0), *local.placements], local.to_local()
    mine = local.chunk(mesh["expert"].size())[mesh.get_local_rank("expert")].contiguous()
    shape, stride = weight.shape, weight.stride()
    part = DTensor.from_local(mine, axes, places, run_check=False, shape=shape, stride=stride)
    return nn.Parameter(part, requires_grad=weight.requires_grad)


@torch.compiler.disable
def _dispatch(
    group: dist.ProcessGroup, num_experts: int, compute: Compute, hidden_TH: Tensor, routing: Routing
) -> Tensor:
    """See :data:`~retemper.engine.model.experts.Dispatch`. All ranks of ``group`` must call this.

    A rank that receives no row calls the same collectives in both passes, with nothing in them.
    """
    order = order_by_expert(routing.experts_TK, num_experts)
    counts_NL = order.counts_E.view(group.size(), -1)
    received_NL = all_to_all_single(counts_NL, None, None, group)
    sent_N, got_N = _read_sizes(counts_NL, received_NL, routing.experts_TK.numel())
    rows_SH = _exchange(expand(hidden_TH, order), got_N, sent_N, group)
    weights_S = _exchange(weights_of_rows(routing.weights_TK, order), got_N, sent_N, group)
    here = order_by_expert(_experts_of_rows(received_NL, sum(got_N)), counts_NL.shape[1])
    results_SH = compute(sort_rows(rows_SH, here), sort_rows(weights_S, here), here.ends_E)
    return combine(_exchange(unsort_rows(results_SH, here), sent_N, got_N, group), order)


def _read_sizes(counts_NL: Tensor, received_NL: Tensor, num_rows: int) -> tuple[list[int], list[int]]:
    """Return how many rows this rank sends to each rank, and receives from each. Waits for the device.

    A dry run has no values to read: its load is balanced.

    Args:
        counts_NL: [N, L] rows of this rank for the experts of each rank.
        received_NL: [N, L] rows of each rank for this rank's experts.
        num_rows: of this rank.
    """
    if isinstance(counts_NL, FakeTensor):
        ranks = len(counts_NL)
        balanced_N = [num_rows * (rank + 1) // ranks - num_rows * rank // ranks for rank in range(ranks)]
        return balanced_N, balanced_N
    sent_N, got_N = torch.stack([counts_NL.sum(1), received_NL.sum(1)]).tolist()
    return sent_N, got_N


def _exchange(x: Tensor, got_N: list[int], sent_N: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send [sum of sent_N, ...] to the ranks in their order, and return [sum of got_N, ...] of them, in that order."""
    return all_to_all_single_autograd(x.contiguous(), got_N, sent_N, group)


def _experts_of_rows(received_NL: Tensor, num_rows: int) -> Tensor:
    """Return [S, 1] int64: which of this rank's experts each received row is for. Rows of one rank are sorted."""
    num_ranks, num_experts = received_NL.shape
    experts_NL = torch.arange(num_experts, device=received_NL.device).repeat(num_ranks)
    return experts_NL.repeat_interleave(received_NL.flatten(), output_size=num_rows)[:, None]
