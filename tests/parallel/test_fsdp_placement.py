"""How FSDP divides stacks of experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from retemper.engine.parallel import fsdp


@pytest.mark.parametrize(
    ("shape", "ranks", "rows"),
    [
        ((8, 6, 4), 4, False),
        ((6, 8, 4), 4, True),
        ((2, 8, 4), 4, True),
        ((6, 7, 4), 4, False),  # FSDP divides other dimensions than the first only evenly
        ((8, 4), 3, False),
        ((6,), 4, False),
    ],
)
def test_stacks_whose_number_does_not_fit_are_divided_by_rows(shape, ranks, rows):
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    assert fsdp._placement(ranks, parameter) == (Shard(1) if rows else None)


def rows_of_experts(ranks):
    """The number of elements that this rank has of each stack of 3 experts that two ranks share."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks.world_size,))
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(3 * 4 * 2.0).view(3, 4, 2))
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: fsdp._placement(2, parameter))
    return module.weight.to_local().tolist()


def test_shares_are_equal(two_ranks):
    first, second = map(torch.tensor, two_ranks.run(rows_of_experts))
    assert torch.equal(torch.cat([first, second], 1), torch.arange(3 * 4 * 2.0).view(3, 4, 2))
    assert first.shape == second.shape == (3, 2, 2)
