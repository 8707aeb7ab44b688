"""Which layouts fit a number of ranks, what is said of those that do not, and who shares an axis with whom."""

import math

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.config.settings import ParallelConfig
from retemper.engine.errors import UserError
from retemper.engine.parallel.layout import AXES, Layout, plan_layout
from retemper.engine.parallel.mesh import build_mesh


@pytest.mark.parametrize(
    ("settings", "world_size", "layout"),
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({}, 32, (1, 1, 32, 1, 1)),
        ({"replicate": 4}, 32, (1, 4, 8, 1, 1)),
        ({"replicate": 32, "shard": 1}, 32, (1, 32, 1, 1, 1)),
        ({"tensor": 8}, 32, (1, 1, 4, 1, 8)),
        ({"pipeline": 2, "tensor": 2, "context": 2, "replicate": 2}, 32, (2, 2, 2, 2, 2)),
    ],
)
def test_layouts(settings, world_size, layout):
    assert plan_layout(ParallelConfig(**settings), world_size) == layout


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (
            {"replicate": 3},
            8,
            "parallel.replicate 3 does not divide the 8 ranks of this run; use a divisor of 8, or start a "
            "multiple of 3 ranks",
        ),
        (
            {"pipeline": 2, "tensor": 3},
            8,
            "parallel.pipeline 2 x parallel.tensor 3 = 6 does not divide the 8 ranks of this run; use a divisor "
            "of 8, or start a multiple of 6 ranks",
        ),
        (
            {"shard": 4, "tensor": 4},
            8,
            "parallel.replicate 1 x parallel.shard 4 x parallel.tensor 4 = 16 ranks, but the run has 8; start that "
            "many ranks or set parallel.shard to auto",
        ),
    ],
)
def test_impossible_products_are_refused_with_both_sides(settings, world_size, message):
    with pytest.raises(UserError) as caught:
        plan_layout(ParallelConfig(**settings), world_size)
    assert str(caught.value) == message


SIZES = st.integers(1, 8)


@settings(deadline=None)
@given(
    sizes=st.fixed_dictionaries({axis: SIZES for axis in AXES if axis != "shard"}),
    shard=st.just("auto") | SIZES,
    world_size=st.integers(1, 512),
)
def test_a_layout_covers_all_ranks_or_is_refused(sizes, shard, world_size):
    others = math.prod(sizes.values())
    fits = world_size % others == 0 if shard == "auto" else others * shard == world_size
    try:
        layout = plan_layout(ParallelConfig(**sizes, shard=shard), world_size)
    except UserError as error:
        assert not fits
        assert "\n" not in str(error) and f" {world_size}" in str(error)
        return
    assert fits
    assert layout.world_size == world_size
    assert all(getattr(layout, axis) == size for axis, size in sizes.items())


def places(ranks, layout):
    mesh = build_mesh(Layout(*layout), "cpu")
    group = {"context": mesh.context_group, "ends": mesh.embedding_group}
    members = {name: found and dist.get_process_group_ranks(found) for name, found in group.items()}
    axes = {axis: mesh.devices[axis].mesh.tolist() for axis in ("pipeline", "shard", "tensor")}
    return mesh.coordinate, mesh.data_rank, mesh.counts_samples, members, axes


@pytest.mark.parametrize(
    ("layout", "rank", "expected"),
    [
        # rank = ((pipeline * replicates + replicate) * shards + shard) * contexts + context) * tensors + tensor
        (
            (2, 1, 1, 1, 2),
            3,
            (
                (1, 0, 0, 0, 1),
                0,
                False,
                {"context": None, "ends": [1, 3]},
                {"pipeline": [1, 3], "shard": [3], "tensor": [2, 3]},
            ),
        ),
        (
            (1, 1, 2, 2, 1),
            2,
            (
                (0, 0, 1, 0, 0),
                1,
                True,
                {"context": [2, 3], "ends": None},
                {"pipeline": [2], "shard": [0, 1, 2, 3], "tensor": [2]},
            ),
        ),
        (
            (1, 2, 2, 1, 1),
            3,
            (
                (0, 1, 1, 0, 0),
                3,
                True,
                {"context": None, "ends": None},
                {"pipeline": [3], "shard": [2, 3], "tensor": [3]},
            ),
        ),
    ],
)
def test_who_shares_an_axis_with_whom(layout, rank, expected, four_ranks):
    assert four_ranks.run(places, layout)[rank] == expected
