"""The order of the rows of experts, and the sums over them, against plain indexing in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retemper.kernels.token_permutation import combine, count, expand, order_by_expert, weights_of_rows

HIDDEN = 5
CASES = {
    "usual": (7, 3, 6),
    "one choice": (9, 1, 4),
    "every expert": (4, 3, 3),
    "more experts than rows": (2, 2, 16),
    "no tokens": (0, 2, 4),
}
"""Tokens, choices of a token, experts."""
every_case = pytest.mark.parametrize("case", CASES)


def choices(case: str) -> tuple[Tensor, int]:
    tokens, chosen, experts = CASES[case]
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)]
    return torch.stack(drawn) if drawn else torch.empty(0, chosen, dtype=torch.int64), experts


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


@every_case
def test_rows_are_sorted_by_expert_then_by_token(case: str) -> None:
    experts_TK, num_experts = choices(case)
    order = order_by_expert(experts_TK, num_experts)
    tokens, chosen = experts_TK.shape
    rows = sorted((int(experts_TK[t, k]), t, k) for t in range(tokens) for k in range(chosen))
    assert order.tokens_R.tolist() == [token for _, token, _ in rows]
    assert order.choices_R.tolist() == [token * chosen + k for _, token, k in rows]
    for row, (_, token, k) in enumerate(rows):
        assert order.rows_TK[token, k] == row
    counts = [sum(expert == other for other, _, _ in rows) for expert in range(num_experts)]
    assert order.counts_E.tolist() == counts and order.counts_E.dtype == torch.int32
    assert order.ends_E.tolist() == [sum(counts[: expert + 1]) for expert in range(num_experts)]
    assert order.ends_E.dtype == torch.int32


@every_case
def test_values_and_gradients_of_plain_indexing(case: str) -> None:
    experts_TK, num_experts = choices(case)
    order = order_by_expert(experts_TK, num_experts)
    tokens, chosen = experts_TK.shape
    of_row = order.choices_R // chosen
    x, weights, y = random(tokens, HIDDEN), random(tokens, chosen), random(tokens * chosen, HIDDEN)
    pairs = [
        (lambda x: expand(x, order), lambda x: x[of_row], x),
        (lambda w: weights_of_rows(w, order), lambda w: w.flatten()[order.choices_R], weights),
        (lambda y: combine(y, order), lambda y: torch.zeros_like(x).index_add(0, of_row, y), y),
    ]
    for actual, expected, argument in pairs:
        mine, theirs = argument.clone().requires_grad_(), argument.clone().requires_grad_()
        result, wanted = actual(mine), expected(theirs)
        assert torch.allclose(result, wanted, rtol=1e-14, atol=1e-14)
        upstream = random(*wanted.shape)
        result.backward(upstream)
        wanted.backward(upstream)
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-14, atol=1e-14)
        assert not argument.numel() or torch.autograd.gradcheck(actual, argument.clone().requires_grad_())


def test_sums_of_bf16_rows_are_rounded_once() -> None:
    """Sums of many choices are taken in fp32."""
    experts_TK = torch.stack([torch.arange(64)] * 8)
    order = order_by_expert(experts_TK, 64)
    y = random(8 * 64, HIDDEN, dtype=torch.bfloat16)
    expected = torch.zeros(8, HIDDEN, dtype=torch.float64).index_add(0, order.tokens_R, y.double())
    actual = combine(y, order)
    assert actual.dtype == torch.bfloat16
    assert ((actual.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()


def test_counts_need_no_values_of_the_device() -> None:
    numbers = torch.tensor([3, 0, 3, 3, 1])
    assert count(numbers, 5).tolist() == torch.bincount(numbers, minlength=5).tolist()
    assert count(numbers.to("meta"), 5).shape == (5,)
    assert count(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
