"""Losses of single tokens equal PyTorch's cross-entropy, and their sum is the loss of training."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import any_head, chunked, linear_cross_entropy, token_losses

CASES = {
    "plain": {},
    "softcap": {"logit_softcap": 3.0},
    "scale and bias": {"logit_scale": 0.5, "bias": torch.linspace(-1, 1, 37)},
}


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(count, 12, generator=generator) for count in (50, 37))
    targets = torch.randint(0, 37, (50,), generator=generator)
    targets[::7] = kernel.IGNORE_INDEX
    return hidden, weight, targets


def logits_of(hidden, weight, logit_softcap=None, logit_scale=1.0, bias=None):
    logits = hidden.double() @ weight.double().t()
    logits = (logits if bias is None else logits + bias) * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("budget", [None, 37 * 4 * 8], ids=["one chunk", "many chunks"])
def test_linear_head(options, budget, inputs, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(kernel, "CPU_LOGIT_BYTES", budget)
        assert len(chunked.chunks(50, budget // (4 * 37))) > 1
    hidden, weight, targets = (one.clone().requires_grad_(one.is_floating_point()) for one in inputs)
    losses = token_losses(hidden, weight, targets, **options)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    logits = logits_of(hidden, weight, **options)
    expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=kernel.IGNORE_INDEX)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    whole = linear_cross_entropy(hidden.detach(), weight.detach(), targets, **options).loss_sum
    assert torch.equal(losses.sum(), whole)


def test_any_head(inputs):
    hidden, weight, targets = inputs
    head = functools.partial(torch.matmul, other=weight.t())
    losses = any_head.chunked_token_losses(head, hidden, targets, 37, budget=37 * any_head.BYTES_PER_LOGIT * 8)
    expected = F.cross_entropy(logits_of(hidden, weight), targets, reduction="none", ignore_index=kernel.IGNORE_INDEX)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    whole = any_head.chunked_cross_entropy(head, hidden, targets, 37).loss_sum
    torch.testing.assert_close(losses.sum(), whole)
