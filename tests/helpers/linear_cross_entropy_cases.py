"""Inputs and comparisons that the tests of the linear cross-entropy share."""

from __future__ import annotations

import torch
from torch import Tensor

from retemper.kernels.linear_cross_entropy import IGNORE_INDEX, LinearCrossEntropy, linear_cross_entropy, reference

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LOSS_TOLERANCE = 1e-4


def make_inputs(
    num_tokens: int, hidden: int, vocab: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, head weight and targets; logits of standard deviation ``size``. Every third target is
    ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = (torch.randn(num_tokens, hidden, generator=generator) * size).to(device, dtype)
    weight_VH = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(device, dtype)
    targets_T = torch.randint(0, vocab, (num_tokens,), generator=generator)
    targets_T[1::3] = IGNORE_INDEX
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), targets_T.to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def oracle(
    inputs: tuple[Tensor, Tensor, Tensor], upstream: float = 1.0, **options
) -> tuple[LinearCrossEntropy, Tensor, Tensor]:
    """(result, hidden gradient, weight gradient) by autograd over whole logits in float64, of the same values."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    result = reference.linear_cross_entropy(hidden, weight, inputs[2], **options)
    (result.loss_sum * upstream).backward()
    return result, hidden.grad, weight.grad


def check(inputs: tuple[Tensor, Tensor, Tensor], upstream: float = 1.0, *, backend: str = "chunked", **options) -> None:
    """Losses, count and both gradients against float64."""
    expected, expected_hidden, expected_weight = oracle(inputs, upstream, **options)
    actual = linear_cross_entropy(*inputs, backend=backend, **options)
    (actual.loss_sum * upstream).backward()
    assert actual.loss_sum.dtype == torch.float32
    assert actual.loss_sum.shape == actual.count.shape == ()
    assert actual.count == expected.count
    assert abs(actual.loss_sum.item() - expected.loss_sum.item()) <= LOSS_TOLERANCE * max(1, int(expected.count))
    tolerance = GRADIENT_TOLERANCE[inputs[0].dtype]
    for value, wanted in ((inputs[0], expected_hidden), (inputs[1], expected_weight)):
        assert value.grad.dtype == value.dtype
        assert relative_error(value.grad, wanted) <= tolerance
