"""Child-tuning: the mask against the paper's update by hand, its statistics, and every layout against one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from retemper.engine.config.settings import OptimizerConfig
from retemper.engine.optim import build_optimizer, child_tuning, step_unless
from retemper.engine.optim.child_tuning import ChildTuning
from retemper.kernels.random_bits import stream_key, uniform

PROBABILITY = 0.3


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _kept(shape, name, step, seed=5):
    """The mask of a whole parameter, by the definition of its stream."""
    key = torch.tensor(stream_key(seed, step, f"child-tuning.{name}"), dtype=torch.int32)
    return (uniform(torch.arange(math.prod(shape)), key) < PROBABILITY).view(shape)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("divisor", [None, 2.0])
def test_the_update_is_that_of_gradients_that_are_masked_and_scaled(name, divisor):
    """The paper's ``grad *= Bernoulli(p).sample() / p`` before an optimizer without it."""
    shapes = {"matrix": (30, 20), "vector": (50,)}
    mine, theirs = ({n: nn.Parameter(_random(*s)) for n, s in shapes.items()} for _ in range(2))
    masked = build_optimizer(mine.items(), OptimizerConfig(name=name, child_tuning=PROBABILITY), 5)
    plain = build_optimizer(theirs.items(), OptimizerConfig(name=name), 5)
    for step in (3, 4):
        for n, shape in shapes.items():
            gradient = _random(*shape, seed=step)
            mine[n].grad = gradient.clone()
            theirs[n].grad = gradient * _kept(shape, n, step) / PROBABILITY
        given = None if divisor is None else torch.tensor(divisor)
        step_unless(masked, torch.zeros(()), given, step)
        step_unless(plain, torch.zeros(()), given)
    for n in shapes:
        torch.testing.assert_close(mine[n], theirs[n], rtol=1e-5, atol=1e-6)


def test_masks_are_fair_and_differ_between_steps_parameters_and_seeds():
    masks = {}
    for key, (seed, name, step) in {
        "a": (1, "x", 1),
        "seed": (2, "x", 1),
        "name": (1, "y", 1),
        "step": (1, "x", 2),
    }.items():
        parameter = nn.Parameter(torch.zeros(200, 300))
        parameter.grad = torch.ones_like(parameter)
        ChildTuning(PROBABILITY, seed).mask_([(name, parameter)], step)
        masks[key] = parameter.grad
        deviation = math.sqrt(PROBABILITY * (1 - PROBABILITY) / parameter.numel())
        assert masks[key].mean().item() == pytest.approx(PROBABILITY, abs=5 * deviation)
    for key in ("seed", "name", "step"):
        both = (masks["a"] * masks[key]).mean().item()
        assert both == pytest.approx(PROBABILITY**2, abs=5 * math.sqrt(0.09 * 0.91 / 60_000))


SHAPES = [(7, 6), (8, 4), (5,), (3, 2, 4), (4, 6, 5)]


def masked_in_shards(ranks, sizes, placements):
    """Masked gradients of whole parameters that ranks share."""
    mesh = init_device_mesh("cpu", sizes)
    found = []
    for seed, shape in enumerate(SHAPES):
        own = [p if p.is_replicate() or p.dim < len(shape) else Replicate() for p in placements]
        parameter = nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, own, src_data_rank=None))
        parameter.grad = distribute_tensor(_random(*shape, seed=seed), mesh, own, src_data_rank=None)
        ChildTuning(PROBABILITY, 5).mask_([(str(seed), parameter)], 9)
        assert isinstance(parameter.grad, DTensor)
        found.append(parameter.grad.full_tensor())
    return found


@pytest.mark.parametrize(
    ("cluster", "sizes", "placements"),
    [
        ("two_ranks", (2,), [Shard(0)]),
        ("two_ranks", (2,), [Shard(1)]),
        ("four_ranks", (2, 2), [Replicate(), Shard(0)]),
        ("four_ranks", (2, 2), [Shard(0), Shard(1)]),
    ],
)
def test_every_layout_and_any_chunks_have_the_same_mask(cluster, sizes, placements, request, monkeypatch):
    expected = [_random(*s, seed=seed) * _kept(s, str(seed), 9) for seed, s in enumerate(SHAPES)]
    for result in request.getfixturevalue(cluster).run(masked_in_shards, sizes, placements):
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
    monkeypatch.setitem(child_tuning._CHUNK_ELEMENTS, "cpu", 13)
    for seed, shape in enumerate(SHAPES):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = _random(*shape, seed=seed)
        ChildTuning(PROBABILITY, 5).mask_([(str(seed), parameter)], 9)
        assert torch.equal(parameter.grad, expected[seed])
