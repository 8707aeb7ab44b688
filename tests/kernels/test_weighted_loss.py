"""Weights of the tokens' losses: values and gradients of every backend against float64 autograd over whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from linear_cross_entropy_cases import GRADIENT_TOLERANCE, make_inputs, relative_error
from torch import Tensor

from retemper.kernels import linear_cross_entropy as kernel
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, reference
from retemper.kernels.linear_cross_entropy.any_head import chunked_cross_entropy

TOKENS, HIDDEN, VOCAB = 37, 32, 98
Z_LOSS, UPSTREAM = 0.01, 1.3


def make_weights() -> Tensor:
    weights_T = torch.rand(TOKENS, generator=torch.Generator().manual_seed(5)) * 3
    weights_T[4:9] = 1.0
    return weights_T


def expected(inputs: tuple[Tensor, Tensor, Tensor], weights_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients of hidden states and weight."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    logits = hidden @ weight.t()
    valid = inputs[2] != IGNORE_INDEX
    losses = F.cross_entropy(logits[valid], inputs[2][valid], reduction="none")
    losses = losses + Z_LOSS * logits[valid].logsumexp(-1).square()
    total = (losses * weights_T[valid].double()).sum()
    (total * UPSTREAM).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


def check(result: Any, inputs: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor]) -> None:
    total, *gradients = wanted
    (result.loss_sum * UPSTREAM).backward()
    assert abs(result.loss_sum.item() - total.item()) <= 1e-4 * total
    assert result.count == (inputs[2] != IGNORE_INDEX).sum()
    for value, gradient in zip(inputs[:2], gradients, strict=True):
        assert relative_error(value.grad, gradient) <= GRADIENT_TOLERANCE[value.dtype]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("chunked", d) for d in GRADIENT_TOLERANCE] + [("triton", torch.bfloat16)]
)
@pytest.mark.parametrize("budget", [7 * VOCAB * 4, 2**20])
def test_kernels(monkeypatch, backend, dtype, budget):
    monkeypatch.setattr(kernel, "logit_budget", lambda device: budget)
    monkeypatch.setattr(kernel, "device_budget", lambda device: budget)
    inputs, weights = make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=4.0), make_weights()
    wanted = expected(inputs, weights)
    check(linear_cross_entropy(*inputs, weights_T=weights, z_loss=Z_LOSS, backend=backend), inputs, wanted)


def test_reference():
    inputs, weights = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32, size=4.0), make_weights()
    result = reference.linear_cross_entropy(*inputs, weights_T=weights, z_loss=Z_LOSS)
    check(result, inputs, expected(inputs, weights))


@pytest.mark.parametrize("budget", [1, 2**20])
def test_any_head(budget):
    hidden, weight, targets = inputs = make_inputs(TOKENS, HIDDEN, VOCAB, torch.float32, size=4.0)
    weights = make_weights()
    result = chunked_cross_entropy(
        lambda rows: rows @ weight.t(), hidden, targets, VOCAB, weights_T=weights, z_loss=Z_LOSS, budget=budget
    )
    check(result, inputs, expected(inputs, weights))


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_weights_of_one_change_no_bit(backend):
    results = []
    for weights in (None, torch.ones(TOKENS)):
        hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, torch.bfloat16, size=4.0)
        loss = linear_cross_entropy(hidden, weight, targets, weights_T=weights, z_loss=Z_LOSS, backend=backend).loss_sum
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def shared_vocabulary(ranks: Any, backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's loss, gradient of the hidden states, and of its rows of the weight."""
    hidden, weight, targets = make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=4.0)
    rows = VOCAB // 2
    mine = weight.detach()[ranks.rank * rows : (ranks.rank + 1) * rows].clone().requires_grad_()
    result = linear_cross_entropy(
        hidden,
        mine,
        targets,
        weights_T=make_weights(),
        z_loss=Z_LOSS,
        vocab_group=dist.group.WORLD,
        backend=backend,
    )
    (result.loss_sum * UPSTREAM).backward()
    return result.loss_sum.detach(), hidden.grad, mine.grad


@pytest.mark.parametrize(("backend", "dtype"), [("chunked", torch.float32), ("triton", torch.bfloat16)])
def test_vocabulary_shared_between_two_ranks(two_ranks, backend, dtype):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("two ranks on the CPU need Triton's interpreter")
    results = two_ranks.run(shared_vocabulary, backend, dtype)
    total, of_hidden, of_weight = expected(make_inputs(TOKENS, HIDDEN, VOCAB, dtype, size=4.0), make_weights())
    for loss, grad_hidden, _ in results:
        assert abs(loss - total) <= 1e-4 * total
        assert relative_error(grad_hidden, of_hidden) <= GRADIENT_TOLERANCE[dtype]
    assert relative_error(torch.cat([grad for *_, grad in results]), of_weight) <= GRADIENT_TOLERANCE[dtype]
