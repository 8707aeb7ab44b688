"""The operations of mixtures of experts on a GPU against float64, in the dtypes that choose each of their kernels.

The same code runs on a CPU, where no kernel is chosen.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retemper.kernels.activations import ACTIVATIONS, weighted_gated
from retemper.kernels.grouped_linear import grouped_linear, grouped_linear_reference
from retemper.kernels.token_permutation import combine, expand, order_by_expert, weights_of_rows

EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 2e-3}
"""The rounding of the result alone is 2^-9 in bf16; fp32 products may use TF32."""
EACH_DTYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
COUNTS = {
    "uneven": [130, 1, 500, 3, 66, 257],
    "experts without rows": [0, 300, 0, 0, 17, 0],
    "one expert": [0, 512, 0],
    "no rows": [0, 0],
}


def random(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).requires_grad_()


def require_close(actual: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for mine, wanted in zip(actual, expected, strict=True):
        assert mine.shape == wanted.shape
        assert (mine.double() - wanted).norm() <= bound * wanted.norm()


@EACH_DEVICE
@EACH_DTYPE
@pytest.mark.parametrize("case", COUNTS)
def test_grouped_linear(case: str, dtype: torch.dtype, device: str) -> None:
    """Also twice with the same bits."""
    counts = COUNTS[case]
    x = random(sum(counts), 64, dtype=dtype, device=device, seed=1)
    weight = random(len(counts), 128, 64, dtype=dtype, device=device, seed=2)
    upstream = random(sum(counts), 128, dtype=dtype, device=device, seed=3).detach()
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    results = []
    for _ in range(2):
        y = grouped_linear(x, weight, ends)
        results.append([y, *torch.autograd.grad(y, (x, weight), upstream)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y64 = grouped_linear_reference(x64, weight64, ends)
    expected = [y64, *torch.autograd.grad(y64, (x64, weight64), upstream.double())]
    require_close(results[0], expected, BOUNDS[dtype])


@EACH_DEVICE
@EACH_DTYPE
def test_permutation(dtype: torch.dtype, device: str) -> None:
    tokens, chosen, experts, hidden = 257, 4, 16, 64
    generator = torch.Generator().manual_seed(0)
    choices = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)]).to(device)
    x = random(tokens, hidden, dtype=dtype, device=device, seed=1)
    weights = random(tokens, chosen, dtype=torch.float32, device=device, seed=2)
    upstream = random(tokens, hidden, dtype=dtype, device=device, seed=3).detach()
    order = order_by_expert(choices, experts)
    assert torch.equal(order.ends_E, torch.bincount(choices.flatten(), minlength=experts).cumsum(0).int())
    y = combine(expand(x, order) * weights_of_rows(weights, order)[:, None].to(dtype), order)
    x64, weights64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    y64 = x64 * weights64.sum(1, keepdim=True)
    actual = [y, *torch.autograd.grad(y, (x, weights), upstream)]
    require_close(actual, [y64, *torch.autograd.grad(y64, (x64, weights64), upstream.double())], BOUNDS[dtype])


@EACH_DEVICE
@EACH_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weighted_gated(activation: str, dtype: torch.dtype, device: str) -> None:
    gate, up = (random(300, 128, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    weights = random(300, dtype=torch.float32, device=device, seed=3)
    upstream = random(300, 128, dtype=dtype, device=device, seed=4).detach()
    y = weighted_gated(gate, up, weights, activation)
    gate64, up64, weights64 = (value.detach().double().requires_grad_() for value in (gate, up, weights))
    y64 = ACTIVATIONS[activation](gate64) * up64 * weights64[:, None]
    actual = [y, *torch.autograd.grad(y, (gate, up, weights), upstream)]
    expected = [y64, *torch.autograd.grad(y64, (gate64, up64, weights64), upstream.double())]
    require_close(actual, expected, BOUNDS[dtype])
