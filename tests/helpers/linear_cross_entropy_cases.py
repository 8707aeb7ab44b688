"""Inputs and comparisons that the tests of the linear cross-entropy share."""

from __future__ import annotations

import torch
from torch import Tensor

from retemper.kernels.linear_cross_entropy import IGNORE_INDEX, LinearCrossEntropy, linear_cross_entropy, reference

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LOSS_TOLERANCE = 1e-4
OPTIONS = {
    "z_loss": {"z_loss": 0.01},
    "logit_softcap": {"logit_softcap": 3.0},
    "logit_scale": {"logit_scale": 0.3},
    "bias": {"bias": 0.5},
    "bias and logit_scale": {"bias": 0.5, "logit_scale": -1.7},
    "all": {"z_loss": 0.01, "logit_softcap": 3.0, "logit_scale": 0.3, "bias": 0.5},
}
"""Options by name; ``bias`` is the standard deviation of its elements."""


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


def peak_bytes(profile: torch.profiler.profile) -> int:
    """Most memory that the allocator had given out at once, beyond what it had at the start."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    total = peak = 0
    for event in events:
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def make_bias(weight_VH: Tensor, size: float | None) -> Tensor | None:
    """A random head bias for ``weight_VH``."""
    if size is None:
        return None
    bias_V = torch.randn(weight_VH.shape[0], generator=torch.Generator().manual_seed(7)) * size
    return bias_V.to(weight_VH.device, weight_VH.dtype).requires_grad_()


def oracle(
    inputs: tuple[Tensor, Tensor, Tensor], upstream: float = 1.0, bias: float | None = None, **options
) -> tuple[LinearCrossEntropy, Tensor, Tensor, Tensor | None]:
    """(result, gradients of hidden states, weight and bias) by autograd over whole logits in float64, of the same
    values."""
    tensors = *inputs[:2], make_bias(inputs[1], bias)
    hidden, weight, double = (None if x is None else x.detach().double().requires_grad_() for x in tensors)
    result = reference.linear_cross_entropy(hidden, weight, inputs[2], bias=double, **options)
    (result.loss_sum * upstream).backward()
    return result, hidden.grad, weight.grad, None if double is None else double.grad


def check(
    inputs: tuple[Tensor, Tensor, Tensor],
    upstream: float = 1.0,
    *,
    backend: str = "chunked",
    bias: float | None = None,
    **options,
) -> None:
    """Losses, count and all gradients against float64."""
    expected, *gradients = oracle(inputs, upstream, bias, **options)
    bias_V = make_bias(inputs[1], bias)
    actual = linear_cross_entropy(*inputs, backend=backend, bias=bias_V, **options)
    (actual.loss_sum * upstream).backward()
    assert actual.loss_sum.dtype == torch.float32
    assert actual.loss_sum.shape == actual.count.shape == ()
    assert actual.count == expected.count
    assert abs(actual.loss_sum.item() - expected.loss_sum.item()) <= LOSS_TOLERANCE * max(1, int(expected.count))
    tolerance = GRADIENT_TOLERANCE[inputs[0].dtype]
    for value, wanted in zip((*inputs[:2], bias_V), gradients, strict=True):
        if value is None:
            continue
        assert value.grad.dtype == value.dtype
        assert relative_error(value.grad, wanted) <= tolerance
