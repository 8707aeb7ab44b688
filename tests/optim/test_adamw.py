"""AdamW with bf16 weights or states against float64, its random rounding against its probabilities, and clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine.config.settings import OptimizerConfig
from retemper.engine.optim import adamw, build_optimizer, clip_divisor, global_norm, step_unless
from retemper.engine.optim.adamw import CompactAdamW
from retemper.engine.optim.fused_adamw import FusedAdamW
from retemper.engine.optim.stochastic_rounding import round_stochastically
from retemper.kernels.random_bits import random_bits, stream_key

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP32, BF16)]  # of weights and states
SETTINGS = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _random(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _spacing(values):
    """Distance of bf16 numbers around float64 ``values``: 8 bits of precision."""
    return torch.exp2(values.abs().log2().floor() - 7)


# -------------------------------------------------------------------------------------------------------------------
# Random bits and rounding


def _python_bits(position: int, key: tuple[int, int]) -> int:
    """The same hash with Python's integers, which never overflow."""

    def mixed(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    key0, key1 = (part % 2**32 for part in key)
    return mixed((mixed(position % 2**32 ^ key0) + key1 + position // 2**32) % 2**32)


def test_the_hash_wraps_around_as_unsigned_integers_do():
    key = stream_key(1234, 7, "weight")
    positions = [*range(100), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 17, 2**40 + 1]
    bits = random_bits(torch.tensor(positions), torch.tensor(key, dtype=torch.int32))
    assert [b % 2**32 for b in bits.tolist()] == [_python_bits(position, key) for position in positions]


def test_streams_of_steps_parameters_seeds_and_neighbours_are_fair_and_independent():
    count = 100_000
    positions = torch.arange(count)

    def stream(*place):
        bits = random_bits(positions, torch.tensor(stream_key(*place), dtype=torch.int32))
        return (bits[:, None] >> torch.arange(32)) & 1

    first = stream(1, 1, "a")
    others = [stream(2, 1, "a"), stream(1, 2, "a"), stream(1, 1, "b"), first.roll(1, 0), first.roll(1, 1)]
    # 5.5 standard deviations of a mean of fair coins: one false alarm in 10^5 over these 192 means.
    bound = 5.5 * 0.5 / math.sqrt(count)
    for bits in [first, *(first ^ other for other in others)]:
        assert (bits.double().mean(0) - 0.5).abs().max() < bound


def test_rounding_goes_up_exactly_as_often_as_unbiased_rounding_must():
    """Every one of the 65536 outcomes once: their mean is the value itself."""
    bits = torch.arange(2**16, dtype=torch.int32)
    for value in (1.00001, -3.14159, 1e-40, 65503.7, -(2.0**-126) * 1.001):
        rounded = round_stochastically(torch.full((2**16,), value), bits).double()
        assert len(rounded.unique()) == 2
        assert rounded.mean().item() == torch.tensor(value).double().item()


def test_what_bf16_can_hold_is_left_alone():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    for bits in (0, 0xFFFF, -1):
        rounded = round_stochastically(every.float(), torch.full((2**16,), bits, dtype=torch.int32))
        nan = every.isnan()
        assert torch.equal(rounded.isnan(), nan)
        assert torch.equal(rounded[~nan].view(torch.int16), every[~nan].view(torch.int16))
    # A NaN whose bits would overflow into a number's.
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(FP32)
    assert round_stochastically(full, torch.full((2,), 0xFFFF, dtype=torch.int32)).isnan().all()


# -------------------------------------------------------------------------------------------------------------------
# AdamW


def _float64_adamw(weight, steps, gradients, settings=SETTINGS):
    reference = nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW([reference], foreach=False, **settings)
    for step in range(steps):
        reference.grad = gradients[step].double()
        optimizer.step()
    return reference.detach(), optimizer.state[reference]


def test_fp32_arithmetic_agrees_with_float64_adamw():
    weight, gradients = _random(60, 50), [_random(60, 50, seed=step) for step in range(1, 41)]
    parameter = nn.Parameter(weight.clone())
    optimizer = CompactAdamW([{"params": [("weight", parameter)]}], FP32, 0, **SETTINGS)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    expected, state = _float64_adamw(weight, 40, gradients)
    assert (parameter - expected).abs().max() < 2e-6
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[parameter][name].double(), state[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("weight_dtype", "state_dtype"), DTYPES)
def test_a_step_from_any_state_is_float64_adamw_rounded_to_a_neighbour_without_bias(weight_dtype, state_dtype):
    weight, first, gradient = (_random(300, 400, seed=seed, dtype=weight_dtype) for seed in range(3))
    parameter = nn.Parameter(weight.clone())
    optimizer = CompactAdamW([{"params": [("weight", parameter)]}], state_dtype, 0, **SETTINGS)
    parameter.grad = first
    optimizer.step()
    before = parameter.detach().double()
    reference = nn.Parameter(before.clone())
    expected = torch.optim.AdamW([reference], foreach=False, **SETTINGS)
    state = optimizer.state[parameter]
    expected.state[reference] = {"step": state["step"].clone()}
    expected.state[reference] |= {name: state[name].double() for name in ("exp_avg", "exp_avg_sq")}
    parameter.grad, reference.grad = gradient, gradient.double()
    optimizer.step()
    expected.step()
    results = [(parameter, reference)] + [(state[n], expected.state[reference][n]) for n in ("exp_avg", "exp_avg_sq")]
    for actual, exact in results:
        actual, exact = actual.detach(), exact.detach()
        tolerance = exact.abs() * 1e-6 + 1e-7
        error = actual.double() - exact
        if actual.dtype == FP32:
            assert (error.abs() < tolerance).all()
            continue
        spacing = _spacing(exact)
        assert (error.abs() < spacing + tolerance).all()
        assert (error != 0).double().mean() > 0.9
        # Errors in units of the spacing have a variance of at most 1/4.
        assert (error / spacing).mean().abs() < 5 * 0.5 / math.sqrt(error.numel())


def test_weights_keep_updates_far_below_half_of_their_resolution_on_average():
    """Below 1 bf16 numbers are 2^-8 apart; steps of 2^-14 would all be lost by rounding to nearest."""
    rate, spacing, num_steps = 2.0**-14, 2.0**-8, 100
    parameter = nn.Parameter(torch.ones(200, 100, dtype=BF16))
    optimizer = CompactAdamW([{"params": [("weight", parameter)]}], FP32, 0, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    assert torch.equal((parameter.float() - rate).to(BF16), parameter)
    for _ in range(num_steps):
        parameter.grad = torch.ones_like(parameter)  # AdamW then moves by exactly the learning rate
        optimizer.step()
    # Number of steps down of each weight: binomial with this probability, as long as none reaches 1/2.
    probability = rate / spacing
    deviation = spacing * math.sqrt(num_steps * probability * (1 - probability) / parameter.numel())
    mean = parameter.detach().double().mean().item()
    assert mean == pytest.approx(1 - num_steps * rate, abs=5 * deviation)
    counts = ((1 - parameter.detach().double()) / spacing).flatten()
    assert counts.var().item() == pytest.approx(num_steps * probability * (1 - probability), rel=0.05)


def test_the_second_moment_follows_changes_below_its_resolution():
    """beta2 0.999 moves a moment by less than 0.001 of itself; to nearest of steps of 0.0078 it would stand still."""
    num_steps, count = 300, 20_000
    parameter = nn.Parameter(torch.ones(count, 1))
    optimizer = CompactAdamW([{"params": [("weight", parameter)]}], BF16, 0, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    parameter.grad = torch.full_like(parameter, math.sqrt(2))
    optimizer.step()
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    for _ in range(num_steps):
        optimizer.step()
    mean = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
    # Between 1 and 2 the spacing is 2^-7; the rounding errors of steps add up to at most this deviation of the mean.
    deviation = 2.0**-7 * 0.5 * math.sqrt(num_steps / count)
    assert mean == pytest.approx(2 - 0.999**num_steps, abs=5 * deviation)


def _trained(parameters, state_dtype, gradients, seed=5):
    """Parameters and states after a step with each of ``gradients`` (whole tensors, by parameter)."""
    parameters = [nn.Parameter(parameter) for parameter in parameters]
    optimizer = CompactAdamW(
        [{"params": [(str(i), p) for i, p in enumerate(parameters)]}], state_dtype, seed, **SETTINGS
    )
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    tensors = [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


SHAPES = [(7, 6), (8, 4), (5,), (3, 2, 4), (1, 9)]


def _weights_and_gradients(weight_dtype):
    weights = [_random(*shape, seed=i, dtype=weight_dtype) for i, shape in enumerate(SHAPES)]
    return weights, [[_random(*shape, seed=10 * s + i) for i, shape in enumerate(SHAPES)] for s in range(1, 4)]


def trained_in_shards(ranks, replicate, dims, weight_dtype, state_dtype):
    """:func:`_trained` on a mesh of copies and shards of dimension ``dims[i]``."""
    mesh = init_device_mesh("cpu", (replicate, ranks.world_size // replicate))
    weights, gradients = _weights_and_gradients(weight_dtype)
    gradients = [[g.to(weight_dtype) for g in step] for step in gradients]
    sharded = [
        distribute_tensor(weight, mesh, [Replicate(), Shard(dim)], src_data_rank=None)
        for weight, dim in zip(weights, dims, strict=True)
    ]
    return _trained(sharded, state_dtype, gradients)


@pytest.mark.parametrize(("weight_dtype", "state_dtype"), DTYPES)
def test_the_same_bits_for_any_layout_and_any_chunks(weight_dtype, state_dtype, two_ranks, four_ranks, monkeypatch):
    """Shards of any dimension, some uneven or empty; copies on other ranks."""
    weights, gradients = _weights_and_gradients(weight_dtype)
    gradients = [[g.to(weight_dtype) for g in step] for step in gradients]
    expected = _trained([w.clone() for w in weights], state_dtype, gradients)
    layouts = [(two_ranks, 1, (0, 1, 0, 1, 0)), (two_ranks, 2, (0,) * 5), (four_ranks, 1, (0, 0, 0, 0, 1))]
    layouts.append((four_ranks, 2, (1, 0, 0, 2, 0)))
    results = [
        result
        for cluster, *arguments in layouts
        for result in cluster.run(trained_in_shards, *arguments, weight_dtype, state_dtype)
    ]
    monkeypatch.setitem(adamw.CHUNK_ELEMENTS, "cpu", 13)
    results.append(_trained([w.clone() for w in weights], state_dtype, gradients))
    for result in results:
        assert [t.dtype for t in result] == [t.dtype for t in expected]
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
    assert not all(map(torch.equal, _trained(weights, state_dtype, gradients, seed=6), expected))


def test_pytorchs_generator_is_neither_read_nor_moved():
    def run(seed):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights, gradients = _weights_and_gradients(BF16)
        result = _trained(weights, BF16, [[g.to(BF16) for g in step] for step in gradients])
        assert torch.equal(torch.get_rng_state(), before)
        return result

    assert all(map(torch.equal, run(1), run(2)))


def test_the_default_is_pytorchs_fused_adamw_and_each_bf16_setting_is_not():
    def built(dtype, **settings):
        return build_optimizer(nn.Linear(3, 2, dtype=dtype).named_parameters(), OptimizerConfig(**settings))

    default = built(FP32)
    assert type(default) is FusedAdamW
    for optimizer in (built(BF16), built(FP32, state_dtype="bf16"), built(BF16, state_dtype="bf16")):
        assert type(optimizer) is CompactAdamW
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


# -------------------------------------------------------------------------------------------------------------------
# Clipping


class _Syncs(TorchDispatchMode):
    """Counts the operators whose result the host waits for, also those within DTensor's own operators."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item")

    def __init__(self):
        super().__init__()
        self.count, self.operators = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.WAITING
        self.operators += 1
        return NotImplemented if any(issubclass(t, DTensor) for t in types) else func(*args, **(kwargs or {}))


def sharded_model(ranks, dtype) -> nn.ParameterList:
    """Sharded parameters of random values, with random gradients."""
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    model = nn.ParameterList()
    for i, shape in enumerate(SHAPES):
        weight, gradient = (
            distribute_tensor(_random(*shape, seed=seed, dtype=dtype), mesh, [Shard(0)], src_data_rank=None)
            for seed in (i, i + 100)
        )
        model.append(nn.Parameter(weight))
        model[-1].grad = gradient
    return model


def clipped(ranks, dtype, max_norm):
    """Norm, whole weights after the update, and (syncs, operators) of clipping and updating sharded parameters."""
    model = sharded_model(ranks, dtype)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(learning_rate=0.03), 0)
    with _Syncs() as syncs:
        norm = global_norm(model.parameters())
        divisor = clip_divisor(norm, max_norm)
    with _Syncs() as control:
        bool(norm > 0)
        model[0].grad.sum().full_tensor().item()
    assert control.count == 2
    step_unless(optimizer, torch.zeros(()), divisor)
    return norm, [p.full_tensor().detach() for p in model], (syncs.count, syncs.operators)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_clipping_of_sharded_gradients_is_float64s_and_never_waits(dtype, max_norm, two_ranks):
    """An update of gradients that are not clipped has the bits of one without clipping."""
    weights, gradients = ([_random(*s, seed=i + at, dtype=dtype) for i, s in enumerate(SHAPES)] for at in (0, 100))
    exact = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    factor = min(1.0, max_norm / exact) if max_norm else 1.0
    unclipped = two_ranks.run(clipped, dtype, 0.0)[0][1]
    for norm, results, (syncs, operators) in two_ranks.run(clipped, dtype, max_norm):
        assert norm.dtype == FP32 and norm.item() == pytest.approx(exact, rel=1e-6)
        assert syncs == 0 < operators
        for i, result in enumerate(results):
            if factor == 1.0:
                assert torch.equal(result, unclipped[i])
            settings = {**SETTINGS, "weight_decay": 0.1 if result.ndim >= 2 else 0.0}
            expected, _ = _float64_adamw(weights[i], 1, [gradients[i].double() * factor], settings)
            rounding = 2e-6 if dtype == FP32 else _spacing(expected) * 1.001
            assert ((result.double() - expected).abs() <= rounding).all()


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_moments_are_those_of_clipped_gradients(state_dtype):
    """The first step hides the factor, which cancels in the weights: the moments show it."""
    parameter = nn.Parameter(torch.zeros(200, 100))
    optimizer = build_optimizer([("weight", parameter)], OptimizerConfig(state_dtype=state_dtype))
    parameter.grad = gradient = _random(200, 100)
    norm = global_norm([parameter])
    exact = gradient.double().norm()
    assert clip_divisor(norm, 1e6).item() == 1.0 and clip_divisor(norm, 0.0) is None
    step_unless(optimizer, torch.zeros(()), clip_divisor(norm, 0.7))
    before = _random(200, 100).double()
    for name, beta, values in (("exp_avg", 0.9, before), ("exp_avg_sq", 0.95, before.square())):
        factor = 0.7 / exact if name == "exp_avg" else (0.7 / exact) ** 2
        ratio = (optimizer.state[parameter][name].double() * values).sum() / values.square().sum()
        assert ratio.item() == pytest.approx((1 - beta) * factor.item(), rel=1e-5 if state_dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("dtypes", [(FP32, "fp32"), (FP32, "bf16"), (BF16, "bf16")])
def test_a_skipped_update_changes_no_bit(dtypes):
    parameter = nn.Parameter(_random(30, 20, dtype=dtypes[0]))
    optimizer = build_optimizer([("weight", parameter)], OptimizerConfig(state_dtype=dtypes[1]))
    for gradient, skip in ((_random(30, 20, seed=1), 0.0), (torch.full((30, 20), float("nan")), 1.0)):
        before = [parameter.detach().clone(), *(v.clone() for v in optimizer.state[parameter].values())]
        parameter.grad = gradient.to(dtypes[0])
        norm = global_norm([parameter])
        step_unless(optimizer, torch.tensor(skip), clip_divisor(norm, 0.5))
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    if isinstance(optimizer, CompactAdamW):  # it counts skipped steps
        del before[1], after[1]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def updated_by_pytorch(ranks, skipped):
    """Parameters and states after three updates by ``torch.optim.AdamW`` and by ours, of which one may be skipped."""
    results = []
    for kind in (torch.optim.AdamW, FusedAdamW):
        model = sharded_model(ranks, FP32)
        options = {"fused": True} if kind is torch.optim.AdamW else {}
        groups = [{"params": list(model)[:2], "weight_decay": 0.1}, {"params": list(model)[2:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.03, betas=(0.9, 0.95), eps=1e-8, **options)
        for step in range(3):
            optimizer.grad_scale = torch.tensor(1.0 + step)
            optimizer.found_inf = torch.tensor(float(step == skipped))
            if step == 1:
                model[0].grad = None
            optimizer.step()
        tensors = [*model, *(value for p in model for value in optimizer.state[p].values())]
        results.append([(t.full_tensor() if isinstance(t, DTensor) else t).detach() for t in tensors])
        assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in model)
        assert [list(state) for state in optimizer.state.values()] == [["step", "exp_avg", "exp_avg_sq"]] * len(model)
    return results


@pytest.mark.parametrize("skipped", [None, 0, 2])
def test_the_update_on_local_parts_has_the_bits_of_pytorchs(skipped, two_ranks):
    for theirs, ours in two_ranks.run(updated_by_pytorch, skipped):
        assert len(theirs) == len(ours) > 8
        assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))


def test_loaded_states_are_the_ones_that_are_updated():
    """The optimizer remembers parts of its states, which loading replaces."""
    one, other = (nn.Parameter(_random(5, 4)) for _ in range(2))
    optimizers = [FusedAdamW([{"params": [parameter]}], lr=0.1) for parameter in (one, other)]
    for step in range(3):
        one.grad, other.grad = _random(5, 4, seed=step), _random(5, 4, seed=step if step > 1 else 9 + step)
        if step == 2:
            other.data.copy_(one.data)
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(one, other)
    for name, value in optimizers[0].state[one].items():
        assert torch.equal(optimizers[1].state[other][name], value), name
