"""Lion against the published program in float64, in every dtype and layout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from retemper.engine.config.settings import LionConfig, OptimizerConfig
from retemper.engine.optim import build_optimizer, step_unless
from retemper.engine.optim.lion import Lion

BF16, FP32 = torch.bfloat16, torch.float32
RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.99)


def _random(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _program_1(weight, momentum, gradient):
    """Program 1 of arXiv 2302.06675, with the decoupled decay of its ``p.data.mul_(1 - lr * wd)``."""
    beta1, beta2 = BETAS
    update = torch.sign(momentum * beta1 + gradient * (1 - beta1))
    weight = weight * (1 - RATE * DECAY) - RATE * update
    return weight, momentum * beta2 + gradient * (1 - beta2)


def _lion(parameter, state_dtype=FP32, seed=3):
    return Lion([{"params": [("w", parameter)]}], state_dtype, seed, lr=RATE, betas=BETAS, weight_decay=DECAY)


def test_fp32_arithmetic_agrees_with_the_published_program():
    weight, momentum = _random(40, 30), torch.zeros(40, 30, dtype=torch.float64)
    parameter, expected = nn.Parameter(weight.clone()), weight.double()
    optimizer = _lion(parameter)
    for step in range(20):
        gradient = _random(40, 30, seed=step + 1)
        parameter.grad = gradient.clone()
        optimizer.step()
        expected, momentum = _program_1(expected, momentum, gradient.double())
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"].double(), momentum, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, BF16)])
def test_bf16_is_rounded_to_a_neighbour_without_bias(dtypes):
    parameter = nn.Parameter(_random(300, 200, dtype=dtypes[0]))
    optimizer = _lion(parameter, dtypes[1])
    state = optimizer.state_of(parameter)["exp_avg"]
    state.copy_(_random(300, 200, seed=1))
    before, gradient = parameter.detach().double(), _random(300, 200, seed=2, dtype=dtypes[0])
    expected = _program_1(before, state.double(), gradient.double())
    parameter.grad = gradient
    optimizer.step()
    for actual, exact in zip((parameter.detach(), state), expected, strict=True):
        error = actual.double() - exact
        if actual.dtype == FP32:
            assert error.abs().max() < 1e-6
            continue
        spacing = torch.exp2(exact.abs().log2().floor() - 7)
        assert (error.abs() < spacing + 1e-6).all()
        assert (error / spacing).mean().abs() < 5 * 0.5 / math.sqrt(error.numel())


SHAPES = [(7, 6), (5,), (3, 2, 4)]


def trained(ranks, placements, dtype):
    """Weights and momentum after three steps, on a mesh of all ranks, or of this process without ``placements``."""
    parameters, mesh = [], placements and init_device_mesh("cpu", (ranks.world_size,))
    for seed, shape in enumerate(SHAPES):
        weight = _random(*shape, seed=seed, dtype=dtype)
        weight = distribute_tensor(weight, mesh, placements, src_data_rank=None) if placements else weight
        parameters.append(nn.Parameter(weight))
    config = OptimizerConfig(name="lion", learning_rate=RATE, lion=LionConfig(*BETAS), state_dtype="bf16")
    optimizer = build_optimizer([(str(place), p) for place, p in enumerate(parameters)], config, 7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for step in range(3):
        for seed, parameter in enumerate(parameters):
            gradient = _random(*SHAPES[seed], seed=10 * step + seed, dtype=dtype)
            if placements:
                gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
            parameter.grad = gradient
        step_unless(optimizer, torch.tensor(float(step == 1)), torch.tensor(2.0))
    tensors = [t for p in parameters for t in (p.detach(), optimizer.state[p]["exp_avg"])]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_same_bits_on_every_layout(dtype, two_ranks):
    expected = trained(None, None, dtype)
    for placements in ([Shard(0)], [Replicate()]):
        for result in two_ranks.run(trained, placements, dtype):
            assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
