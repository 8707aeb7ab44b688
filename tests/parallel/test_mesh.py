"""Which mesh shapes fit a number of ranks, and what is said of those that do not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.config import ParallelConfig
from retemper.engine.errors import UserError
from retemper.engine.parallel.mesh import AXES, mesh_shape


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "shape"),
    [
        (1, "auto", 1, (1, 1)),
        (1, "auto", 32, (1, 32)),
        (4, "auto", 32, (4, 8)),
        (4, 8, 32, (4, 8)),
        (32, 1, 32, (32, 1)),
        (32, "auto", 32, (32, 1)),
    ],
)
def test_shapes(replicate, shard, world_size, shape):
    assert mesh_shape(ParallelConfig(replicate=replicate, shard=shard), world_size) == shape
    assert len(AXES) == len(shape)


@settings(deadline=None)
@given(replicate=st.integers(1, 64), shard=st.just("auto") | st.integers(1, 64), world_size=st.integers(1, 512))
def test_a_shape_covers_all_ranks_or_is_refused(replicate, shard, world_size):
    config = ParallelConfig(replicate=replicate, shard=shard)
    fits = world_size % replicate == 0 if shard == "auto" else replicate * shard == world_size
    if not fits:
        with pytest.raises(UserError) as caught:
            mesh_shape(config, world_size)
        message = str(caught.value)
        assert "\n" not in message
        assert f"parallel.replicate {replicate} " in message
        assert f" {world_size}" in message
        if shard != "auto":
            assert f"x parallel.shard {shard} = {replicate * shard} ranks" in message
        return
    shape = mesh_shape(config, world_size)
    assert shape[0] == replicate
    assert shape[0] * shape[1] == world_size
