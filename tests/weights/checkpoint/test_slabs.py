"""Host memory for copies of a model: no two buffers overlap, and PyTorch's rounding of pinned memory costs nothing."""

from __future__ import annotations

import random

import pytest
import torch

from retemper.benchmarks.peers import MODELS
from retemper.engine.model.implementations import meta_model, parse_architecture
from retemper.engine.weights.checkpoint.slabs import ALIGNMENT, SLAB_BYTES, plan_slabs
from retemper.engine.weights.checkpoint.staging import Staging


def rounded(size: int) -> int:
    """What PyTorch allocates for a pinned tensor."""
    power = 1
    while power < size:
        power *= 2
    return power


def sizes_of(name: str, state_bytes: int) -> list[int]:
    """Bytes of each weight and of its two moments."""
    model = meta_model(parse_architecture(MODELS[name], name))
    numbers = [parameter.numel() for parameter in model.parameters()]
    return [count * state_bytes for count in numbers for _ in range(3)]


@pytest.mark.parametrize("state_bytes", [2, 4])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_takes_little_more_than_its_size(name, state_bytes):
    sizes = sizes_of(name, state_bytes)
    one_by_one = sum(map(rounded, sizes))
    assert one_by_one > 1.7 * sum(sizes)
    plan = plan_slabs(sizes)
    assert sum(map(rounded, plan.slab_bytes)) == plan.total_bytes < 1.001 * sum(sizes)


def test_buffers_do_not_overlap():
    generator = random.Random(0)
    sizes = [
        generator.choice([0, 1, 4, 511, 513, 10**6, SLAB_BYTES // 3, SLAB_BYTES, 5 * SLAB_BYTES // 2])
        for _ in range(200)
    ]
    plan = plan_slabs(sizes)
    ends = dict.fromkeys(range(len(plan.slab_bytes)), 0)
    for (slab, start), size in sorted(zip(plan.places, sizes, strict=True)):
        assert start % ALIGNMENT == 0 and start >= ends[slab]
        ends[slab] = start + size
        assert ends[slab] <= plan.slab_bytes[slab]


def test_copies_have_the_values_of_every_shape_and_dtype():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5, generator=generator),
        "bf16": torch.randn(3, 3, generator=generator).bfloat16(),
        "step": torch.tensor(4.0),
        "empty": torch.zeros(0, 5),
        "integers": torch.arange(9),
    }
    staging = Staging()
    staging.begin(tensors)
    copies = dict(staging.copy())
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor) and copies[name].dtype == tensor.dtype, name
    # Other tensors need other buffers.
    staging.begin({"matrix": torch.ones(2, 2)})
    assert {name: copy.tolist() for name, copy in staging.copy().items()} == {"matrix": [[1.0, 1.0]] * 2}
