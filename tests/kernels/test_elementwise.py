"""RMSNorm, rotary embedding and SwiGLU against their published formulas in float64."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from retemper.kernels.activations import ACTIVATIONS, gated, weighted_gated
from retemper.kernels.rms_norm import rms_norm
from retemper.kernels.rope import apply_rope, apply_rope_to_pair, rope_cos_sin


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compare(actual: Tensor, expected: Tensor, inputs: list[Tensor], doubles: list[Tensor], tolerance: float) -> None:
    """Values, and the gradient of every input, in relative norm."""
    assert (actual - expected).norm() <= tolerance * expected.norm()
    upstream = random(*actual.shape, seed=99).detach()
    actual.backward(upstream.to(actual.dtype))
    expected.backward(upstream.double())
    for value, wanted in zip(inputs, doubles, strict=True):
        assert (value.grad - wanted.grad).norm() <= tolerance * wanted.grad.norm()


@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 8), (1, 2)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_rms_norm(shape, eps, size):
    x = (random(*shape, seed=1).detach() * size).requires_grad_()
    weight = random(shape[-1], seed=2)
    x64, weight64 = (v.detach().double().requires_grad_() for v in (x, weight))
    expected = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + eps) * weight64
    actual = rms_norm(x, weight, eps)
    compare(actual, expected, [x, weight], [x64, weight64], 2e-6)


def test_rms_norm_of_a_sum():
    """Of the stream and what is added to it; the sum is a result of its own, with a gradient."""
    x, residual, weight = random(5, 8, seed=1), random(5, 8, seed=3), random(8, seed=2)
    leaves = [x, residual, weight]
    doubles = [value.detach().double().requires_grad_() for value in leaves]
    total64 = doubles[0] + doubles[1]
    norm64 = total64 / torch.sqrt((total64**2).mean(-1, keepdim=True) + 0.1) * doubles[2]
    actual = torch.cat(rms_norm(x, weight, 0.1, residual))
    compare(actual, torch.cat((norm64, total64)), leaves, doubles, 2e-6)


def test_rms_norm_of_bf16_takes_its_mean_in_fp32():
    x, weight = random(4, 4096, seed=1).detach().bfloat16(), random(4096, seed=2).detach().bfloat16()
    actual = rms_norm(x, weight, 1e-6)
    x64 = x.double()
    normalized = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 1e-6)
    assert actual.dtype == torch.bfloat16
    # The published models round twice: the normalized value, then its product with the weight.
    expected = (normalized.float().bfloat16().double() * weight.double()).bfloat16()
    assert (actual != expected).double().mean() < 0.01
    assert (actual.double() - normalized * weight.double()).norm() <= 5e-3 * expected.double().norm()


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_rope_multiplies_complex_numbers():
    """Dimension i and i + D/2 are the parts of a complex number that turns by position x frequency."""
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 1000, 31])
    frequencies = [1.0, 0.1, 0.01, 1e-4]
    x = random(len(positions), 3, 8, seed=5)
    cos, sin = rope_cos_sin(positions, torch.tensor(frequencies))
    assert cos.shape == sin.shape == (len(positions), 8)
    assert cos.dtype == sin.dtype == torch.float32
    actual = apply_rope(x, cos, sin)
    x64 = x.detach().double().requires_grad_()
    turned = [
        [
            torch.complex(x64[t, :, i], x64[t, :, i + 4]) * cmath.exp(1j * int(position) * frequency)
            for i, frequency in enumerate(frequencies)
        ]
        for t, position in enumerate(positions)
    ]
    expected = torch.stack(
        [torch.stack([z.real for z in row] + [z.imag for z in row], dim=-1) for row in turned],
    )
    # Angles are fp32: at position 1000 a rounding of 2^-24 of the frequency is worth 3e-5.
    compare(actual, expected, [x], [x64], 2e-5)


def test_rope_keeps_norms_and_depends_on_distance_only():
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.01])
    q, k = random(1, 1, 8, seed=1).detach(), random(1, 1, 8, seed=2).detach()

    def turned(x: Tensor, position: int) -> Tensor:
        return apply_rope(x, *rope_cos_sin(torch.tensor([position]), frequencies))

    assert torch.allclose(turned(q, 7).norm(), q.norm(), rtol=1e-6)
    near, far = (turned(q, 5 + d) * turned(k, 2 + d) for d in (0, 40))
    assert math.isclose(near.sum(), far.sum(), rel_tol=1e-4)
    assert not math.isclose(near.sum(), (turned(q, 6) * turned(k, 2)).sum(), rel_tol=1e-2)
    assert torch.equal(turned(q, 0), q)


def test_rope_of_queries_and_keys_is_that_of_each():
    q, k = random(3, 4, 6, seed=1), random(3, 2, 6, seed=2)
    angles = rope_cos_sin(torch.arange(3), torch.tensor([1.0, 0.1, 0.01]))
    for turned, x in zip(apply_rope_to_pair(q, k, *angles), (q, k), strict=True):
        assert torch.equal(turned, apply_rope(x, *angles))


def test_rope_keeps_the_dtype():
    cos, sin = rope_cos_sin(torch.arange(3), torch.tensor([1.0, 0.1]))
    assert apply_rope(torch.zeros(3, 2, 4, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_swiglu():
    gate, up = random(9, 12, seed=1), random(9, 12, seed=2)
    gate64, up64 = (v.detach().double().requires_grad_() for v in (gate, up))
    compare(gated(gate, up), gate64 / (1 + torch.exp(-gate64)) * up64, [gate, up], [gate64, up64], 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weighted_gated(activation):
    """Each row of the gated activation times its weight: the plain formula under autograd, in float64."""
    formulas = {
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu2": lambda x: x.clamp(min=0) ** 2,
    }
    leaves = [random(9, 6, seed=1), random(9, 6, seed=2), random(9, seed=3)]
    doubles = [value.detach().double().requires_grad_() for value in leaves]
    gate, up, weights = doubles
    expected = formulas[activation](gate) * up * weights[:, None]
    compare(weighted_gated(*leaves, activation), expected, leaves, doubles, 1e-6)
    exact = [value.detach().clone().requires_grad_() for value in doubles]
    exact[2] = exact[2].detach().float().requires_grad_()  # gradients of the weights are fp32
    assert weighted_gated(*exact, activation).dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda gate, up: weighted_gated(gate, up, weights.detach(), activation), tuple(exact[:2])
    )


def test_weighted_gated_keeps_its_arguments_alone():
    leaves = [random(9, 6, seed=1), random(9, 6, seed=2), random(9, seed=3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        weighted_gated(*leaves)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in leaves}
