"""Muon against ``torch.optim.Muon`` and float64, and on every layout of ranks against one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from retemper.engine.config.settings import MuonConfig, OptimizerConfig
from retemper.engine.optim import build_optimizer, muon, set_learning_rate, step_unless
from retemper.engine.optim.base import CombinedOptimizer
from retemper.engine.optim.fused_adamw import FusedAdamW
from retemper.engine.optim.muon import Muon
from retemper.engine.optim.newton_schulz import COEFFICIENTS, newton_schulz

BF16, FP32 = torch.bfloat16, torch.float32
RATE, DECAY, MOMENTUM = 0.03, 0.1, 0.95


def _random(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _muon(parameters, dtype=FP32, scale="rms", nesterov=True, state_dtype=FP32, seed=5):
    groups = [{"params": [(str(place), p) for place, p in enumerate(parameters)]}]
    settings = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    return Muon(groups, state_dtype, seed, dtype, 5, scale, nesterov, **settings)


# -------------------------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize(("scale", "theirs"), [("rms", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_bf16_iteration_is_that_of_pytorch(scale, theirs, nesterov):
    weights = [_random(24, 40), _random(40, 24, seed=1)]
    mine, reference = ([nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    settings = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    expected = torch.optim.Muon(reference, nesterov=nesterov, adjust_lr_fn=theirs, **settings)
    optimizer = _muon(mine, BF16, scale, nesterov)
    for step in range(5):
        for place, (one, other) in enumerate(zip(mine, reference, strict=True)):
            one.grad = _random(*one.shape, seed=10 * step + place)
            other.grad = one.grad.clone()
        optimizer.step()
        expected.step()
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[one]["momentum_buffer"], expected.state[other]["momentum_buffer"])


def _float64_muon(weight, gradients, scale="rms"):
    """The published update, with a plain loop in float64."""
    weight, buffer = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    rows, columns = weight.shape
    for gradient in gradients:
        gradient = gradient.double()
        buffer = MOMENTUM * buffer + gradient
        x = gradient + MOMENTUM * buffer
        x = x / x.norm()
        for _ in range(5):
            a, b, c = 3.4445, -4.7750, 2.0315
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        factor = 0.2 * math.sqrt(max(rows, columns)) if scale == "rms" else math.sqrt(max(1, rows / columns))
        weight = weight - RATE * DECAY * weight - RATE * factor * x
    return weight


@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 9)])
def test_the_fp32_iteration_agrees_with_float64(shape, scale):
    weight, gradients = _random(*shape), [_random(*shape, seed=seed) for seed in range(1, 6)]
    parameter = nn.Parameter(weight.clone())
    optimizer = _muon([parameter], scale=scale)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), _float64_muon(weight, gradients, scale), rtol=0, atol=1e-5)


def test_singular_values_become_about_one_and_vectors_stay():
    matrix = _random(30, 50).double()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = newton_schulz(matrix, 5)
    values = torch.diagonal(u.T @ result @ v.T)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(u @ torch.diag(values) @ v, result)
    assert COEFFICIENTS == (3.4445, -4.7750, 2.0315)


def test_a_stack_of_experts_is_a_matrix_each():
    stack, gradients = _random(3, 6, 8), [_random(3, 6, 8, seed=seed) for seed in (1, 2)]
    whole, single = nn.Parameter(stack.clone()), [nn.Parameter(matrix.clone()) for matrix in stack]
    optimizers = [_muon([whole]), _muon(single)]
    for gradient in gradients:
        whole.grad = gradient.clone()
        for place, parameter in enumerate(single):
            parameter.grad = gradient[place].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole.detach(), torch.stack([p.detach() for p in single]), rtol=1e-6, atol=1e-6)


def test_bf16_weights_move_on_average_as_fp32_ones():
    weight, gradient = torch.ones(200, 300), _random(200, 300, seed=3)
    narrow, wide = nn.Parameter(weight.to(BF16)), nn.Parameter(weight.clone())
    for parameter, state_dtype in ((narrow, BF16), (wide, FP32)):
        optimizer = _muon([parameter], state_dtype=state_dtype)
        set_learning_rate_of(optimizer, 1e-4)
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    step = (wide.detach() - 1).double()
    found = (narrow.detach().double() - 1) - step
    assert step.abs().max() < 2.0**-9  # to nearest, nothing would move
    assert found.mean().abs() < 5 * 2.0**-7 * 0.5 / math.sqrt(found.numel())
    slope = ((narrow.detach().double() - 1) * step).sum() / step.square().sum()
    assert slope.item() == pytest.approx(1.0, abs=0.2)


def set_learning_rate_of(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16)])
def test_a_skipped_update_changes_no_bit(dtypes):
    parameter = nn.Parameter(_random(30, 20, dtype=dtypes[0]))
    optimizer = _muon([parameter], state_dtype=dtypes[1])
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    for gradient, skip in ((_random(30, 20, seed=1), 0.0), (torch.full((30, 20), math.nan), 1.0)):
        before = [parameter.detach().clone(), optimizer.state_of(parameter)["momentum_buffer"].clone()]
        parameter.grad = gradient.to(dtypes[0])
        step_unless(optimizer, torch.tensor(skip), torch.tensor(2.0))
        assert torch.equal(parameter.detach(), before[0]) == bool(skip)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before[1])


def test_which_parameters_are_muons():
    shapes = {
        "model.embed_tokens.weight": (12, 4),
        "lm_head.weight": (12, 4),
        "model.layers.0.q_proj.weight": (4, 4),
        "model.layers.0.q_proj.bias": (4,),
        "model.layers.0.router.weight": (3, 4),
        "model.layers.0.mlp.experts.down_proj": (3, 4, 4),
        "model.layers.0.conv.weight": (4, 1, 3),
    }
    named = [(name, nn.Parameter(_random(*shape))) for name, shape in shapes.items()]
    settings = OptimizerConfig(name="muon", muon=MuonConfig(exclude=["*router*"]))
    optimizer = build_optimizer(named, settings, tables={"model.embed_tokens.weight", "lm_head.weight"})
    assert isinstance(optimizer, CombinedOptimizer)
    first, second = optimizer.parts
    assert isinstance(first, Muon) and isinstance(second, FusedAdamW)
    assert {name for name, _, _ in first.named()} == {
        "model.layers.0.q_proj.weight",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert {name for name, _, _ in optimizer.named()} == shapes.keys()
    set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.7] * 3
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    step_unless(optimizer, torch.zeros(()))
    assert all({"momentum_buffer", "exp_avg"} & optimizer.state[p].keys() for _, p in named)


# -------------------------------------------------------------------------------------------------------------------
# Several ranks

SHAPES = [(7, 6), (8, 4), (4, 10), (5, 3, 4), (1, 9), (6, 6), (9, 2)]


def _trained(parameters, gradients, dtypes):
    parameters = [nn.Parameter(parameter) for parameter in parameters]
    optimizer = _muon(parameters, state_dtype=dtypes[1])
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    tensors = [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def _weights_and_gradients(dtype):
    weights = [_random(*shape, seed=place, dtype=dtype) for place, shape in enumerate(SHAPES)]
    gradients = [[_random(*s, seed=10 * n + i, dtype=dtype) for i, s in enumerate(SHAPES)] for n in range(1, 4)]
    return weights, gradients


def trained_in_shards(ranks, sizes, placements, dtypes):
    """Results of :func:`_trained` on a mesh, and the number of matrices that each rank orthogonalized."""
    mesh = init_device_mesh("cpu", sizes)
    weights, gradients = _weights_and_gradients(dtypes[0])
    shards = [distribute_tensor(weight, mesh, placements, src_data_rank=None) for weight in weights]
    count, largest, plain = 0, 0, muon.newton_schulz

    def counted(matrix, num_steps):
        nonlocal count, largest
        count, largest = count + 1, max(largest, matrix.numel())
        return plain(matrix, num_steps)

    muon.newton_schulz = counted
    try:
        return _trained(shards, gradients, dtypes), count
    finally:
        muon.newton_schulz = plain


LAYOUTS = [
    ("two_ranks", (2,), [Shard(0)]),
    ("two_ranks", (2,), [Shard(1)]),
    ("two_ranks", (2,), [Replicate()]),
    ("four_ranks", (4,), [Shard(0)]),
    ("four_ranks", (2, 2), [Replicate(), Shard(0)]),
    ("four_ranks", (2, 2), [Shard(0), Shard(1)]),
    ("four_ranks", (2, 2), [Shard(0), Shard(0)]),
]


@pytest.mark.parametrize(("cluster", "sizes", "placements"), LAYOUTS)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16)], ids=["fp32", "bf16"])
def test_every_layout_has_the_bits_of_one_process(cluster, sizes, placements, dtypes, request):
    """Even, uneven and empty shards of both dimensions, and copies on other ranks."""
    expected = _trained(*_weights_and_gradients(dtypes[0]), dtypes)
    found = request.getfixturevalue(cluster).run(trained_in_shards, sizes, placements, dtypes)
    for result, _ in found:
        for one, other in zip(result, expected, strict=True):
            assert one.dtype == other.dtype
            if one.ndim == 3:  # the products of several matrices at a time may be computed in another order
                torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == BF16 else 1e-5, atol=1e-6)
            else:
                assert torch.equal(one, other)
    counts = [count for _, count in found]
    if placements != [Replicate()]:
        # In each of the three steps, a matrix is orthogonalized on one rank, not on all.
        # The part of a stack that several ranks share is orthogonalized on one of them.
        shared = math.prod(size for size, place in zip(sizes, placements, strict=True) if place == Shard(1))
        stacks = 3 * len(counts) // shared
        assert sum(counts) == 3 * (len(SHAPES) - 1) + stacks
        assert max(counts) - min(counts) <= 6  # one for each step, and kind of parameter
