"""AdamW with 8-bit states against torchao's, on every layout, and what is refused."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchao.optim import AdamW8bit as TorchaoAdamW8bit

from retemper.engine.config.settings import OptimizerConfig, ParameterGroupConfig
from retemper.engine.errors import UserError
from retemper.engine.optim import build_optimizer, set_learning_rate, step_unless
from retemper.engine.optim.adamw_8bit import AdamW8bit
from retemper.engine.optim.state_sizes import state_itemsizes

BF16, FP32 = torch.bfloat16, torch.float32
RATE = 1e-3
CONFIG = OptimizerConfig(name="adamw_8bit", learning_rate=RATE, weight_decay=0.1)
SETTINGS = {"lr": RATE, "betas": (CONFIG.beta1, CONFIG.beta2), "eps": CONFIG.eps, "weight_decay": 0.1}
CODED = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale")
# Matrices with states of 8 bits, of which one cannot be divided evenly, a stack of them, and parameters without.
SHAPES = [(24, 512), (17, 512), (3, 16, 256), (32, 100), (512,), (2, 256)]
NUM_CODED = 3


def _random(*shape, seed=0, dtype=FP32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def _gradient(shape, step, dtype=FP32):
    """Gradients whose columns have sizes of four orders of magnitude, so that blocks use many of the codes."""
    return (_random(*shape, seed=step + 100) * torch.logspace(-4, 0, shape[-1])).to(dtype)


def _coded(parameter, compiled=False, seed=3):
    return AdamW8bit([{"params": [("w", parameter)]}], seed, compiled, **SETTINGS)


def test_twenty_steps_agree_with_torchao():
    """Both round the same numbers to codes, up to the last bit of fp32, so that one in many is rounded to the next."""
    shape = (96, 512)
    ours, theirs = (nn.Parameter(_random(*shape)) for _ in range(2))
    optimizer = _coded(ours)
    expected = TorchaoAdamW8bit([theirs], **SETTINGS)
    with torch.compiler.set_stance("force_eager"):
        for step in range(20):
            rate = RATE * (step + 1) / 20
            optimizer.param_groups[0]["lr"] = rate
            expected.param_groups[0]["lr"].fill_(rate)
            ours.grad, theirs.grad = _gradient(shape, step), _gradient(shape, step)
            optimizer.step()
            expected.step()
            state, reference = optimizer.state[ours], expected.state[theirs]
            for name in ("exp_avg", "exp_avg_sq"):
                codes, wanted = state[f"{name}_codes"].int(), reference[name].codes.int()
                assert (codes - wanted).abs().max() <= 1 and (codes != wanted).double().mean() < 1e-3
                torch.testing.assert_close(state[f"{name}_scale"].flatten(), reference[name].scale, rtol=1e-6, atol=0)
                assert len(codes.unique()) > 200
    difference = (ours - theirs).abs()
    assert (difference > 1e-7).double().mean() < 1e-3 and difference.max() < 0.1 * RATE
    assert (ours - _random(*shape)).abs().mean() > RATE


@pytest.mark.slow
def test_the_compiled_update_agrees():
    results = []
    for compiled in (False, True):
        parameter = nn.Parameter(_random(40, 512))
        optimizer = _coded(parameter, compiled)
        for step in range(5):
            parameter.grad = _gradient((40, 512), step)
            optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]))
    (one, state), (other, compiled_state) = results
    assert ((one - other).abs() > 1e-7).double().mean() < 1e-3
    for name in ("exp_avg_codes", "exp_avg_sq_codes"):
        assert (state[name] != compiled_state[name]).double().mean() < 1e-3


def test_bf16_weights_are_rounded_to_a_neighbour_without_bias():
    weight, gradient = _random(200, 512, dtype=BF16), _gradient((200, 512), 0, BF16)
    rounded, exact = nn.Parameter(weight.clone()), nn.Parameter(weight.float())
    for parameter in (rounded, exact):
        parameter.grad = gradient.to(parameter.dtype)
        _coded(parameter).step()
    error = rounded.detach().double() - exact.detach().double()
    spacing = torch.exp2(exact.detach().double().abs().log2().floor() - 7)
    assert (error.abs() < spacing).all() and (error != 0).double().mean() > 0.9
    assert (error / spacing).mean().abs() < 5 * 0.5 / math.sqrt(error.numel())


def built(dtype=FP32, mesh=None, placements=None, config=CONFIG, shapes=SHAPES):
    parameters = []
    for seed, shape in enumerate(shapes):
        weight = _random(*shape, seed=seed, dtype=dtype)
        parameters.append(nn.Parameter(_placed(weight, mesh, placements)))
    return parameters, build_optimizer([(f"w{place}", p) for place, p in enumerate(parameters)], config, 7)


def _placed(tensor, mesh, placements):
    if mesh is None:
        return tensor
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def trained(ranks, placements, dtype, shapes=SHAPES):
    """Weights and states after three steps, of which one is skipped; on all ranks, or in this process without
    ``placements``.
    """
    mesh = placements and init_device_mesh("cpu", (ranks.world_size,))
    parameters, optimizer = built(dtype, mesh, placements, shapes=shapes)
    for step in range(3):
        for shape, parameter in zip(shapes, parameters, strict=True):
            parameter.grad = _placed(_gradient(shape, step, dtype), mesh, placements)
        step_unless(optimizer, torch.tensor(float(step == 1)), torch.tensor(2.0))
    tensors = [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_same_bits_on_every_layout(dtype, two_ranks):
    cases = [([Shard(0)], SHAPES), ([Replicate()], SHAPES), ([Shard(1)], SHAPES[:2])]
    for placements, shapes in cases:
        expected = trained(None, None, dtype, shapes)
        for result in two_ranks.run(trained, placements, dtype, shapes):
            assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def test_small_and_narrow_parameters_and_vectors_have_the_states_of_adamw():
    parameters, optimizer = built()
    reference, expected = built(config=OptimizerConfig(learning_rate=RATE, weight_decay=0.1))
    for step in range(3):
        for shape, one, other in zip(SHAPES, parameters, reference, strict=True):
            one.grad, other.grad = _gradient(shape, step), _gradient(shape, step)
        optimizer.step()
        expected.step()
    for place, (one, other) in enumerate(zip(parameters, reference, strict=True)):
        if place < NUM_CODED:
            assert tuple(optimizer.state[one]) == ("step", *CODED)
        else:
            assert tuple(optimizer.state[one]) == ("step", "exp_avg", "exp_avg_sq") and torch.equal(one, other)


def test_a_skipped_step_changes_no_bit_and_gradients_are_divided():
    (one, *_), optimizer = built()
    (other, *_), divided = built()
    one.grad, other.grad = _gradient(SHAPES[0], 0), 8 * _gradient(SHAPES[0], 0)
    step_unless(optimizer, torch.tensor(0.0))
    step_unless(divided, torch.tensor(0.0), torch.tensor(8.0))
    assert torch.equal(one, other)
    states = [optimizer.state[one][name] for name in CODED]
    assert all(torch.equal(state, divided.state[other][name]) for state, name in zip(states, CODED, strict=True))
    before = [t.detach().clone() for t in (one, *states)]
    one.grad = torch.full_like(one, math.nan)
    step_unless(optimizer, torch.tensor(1.0))
    assert all(torch.equal(t, old) for t, old in zip((one, *states), before, strict=True))


def test_groups_have_their_learning_rate():
    config = OptimizerConfig(
        name="adamw_8bit",
        learning_rate=RATE,
        weight_decay=0.0,
        groups=[ParameterGroupConfig(match="w1", learning_rate=RATE / 4)],
    )
    parameters, optimizer = built(config=config, shapes=[(16, 512), (16, 512)])
    set_learning_rate(optimizer, RATE / 2)
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)  # AdamW then moves by exactly the learning rate
    optimizer.step()
    for parameter, old, rate in zip(parameters, before, (RATE / 2, RATE / 8), strict=True):
        torch.testing.assert_close((old - parameter).detach(), torch.full((16, 512), rate), rtol=1e-3, atol=0)


def test_sizes_are_those_of_the_states():
    parameters, optimizer = built()
    for shape, parameter in zip(SHAPES, parameters, strict=True):
        states = optimizer_states(optimizer, parameter)
        size = sum(state.numel() * state.element_size() for state in states)
        assert size == math.prod(shape) * sum(state_itemsizes("w", shape, CONFIG, ()))
    assert sum(state_itemsizes("w", (4096, 4096), CONFIG, ())) == 2 + 2 * 4 / 256


def optimizer_states(optimizer, parameter):
    for part in optimizer.parts:
        if any(parameter is mine for _, _, mine in part.named()):
            part.state_of(parameter)
    return [state for name, state in optimizer.state[parameter].items() if name != "step"]


def refused_split(ranks):
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    with pytest.raises(UserError) as error:
        built(FP32, mesh, [Shard(1)], shapes=[(32, 256)])
    return str(error.value)


def test_tensor_parallel_ranks_that_divide_blocks_are_refused(two_ranks):
    for line in two_ranks.run(refused_split):
        assert "2 tensor-parallel ranks divide the rows of w0, which are 256 wide" in line
        assert "lower parallel.tensor" in line and "\n" not in line


def test_a_missing_torchao_is_refused_with_its_installation(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        built()
    assert "torchao is not installed" in str(error.value) and "[fp8]" in str(error.value)
