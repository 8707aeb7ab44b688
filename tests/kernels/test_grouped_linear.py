"""Linear layers of experts against their float64 reference: values, gradients, and contracts of the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retemper.kernels import grouped_linear as grouped_linear_module
from retemper.kernels.grouped_linear import grouped_linear, grouped_linear_reference

INPUTS, OUTPUTS = 16, 24
COUNTS = {
    "uneven": [5, 1, 9, 2],
    "some experts without rows": [0, 7, 0, 0, 3, 0],
    "all rows on one expert": [0, 11, 0],
    "one expert": [6],
    "no rows": [0, 0, 0],
    "more rows than are rounded up": [40, 0, 33, 70, 5, 64],
}


def arguments(counts: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), INPUTS, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), OUTPUTS, INPUTS, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts).cumsum(0, dtype=torch.int32)


def upstream(rows: int) -> Tensor:
    return torch.randn(rows, OUTPUTS, generator=torch.Generator().manual_seed(2))


def check(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None and expected is not None and actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COUNTS)
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    x, weight, ends = arguments(COUNTS[case], dtype)
    x64, weight64 = (value.detach().double().requires_grad_() for value in (x, weight))
    actual, expected = grouped_linear(x, weight, ends), grouped_linear_reference(x64, weight64, ends)
    assert actual.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    check(actual, expected, tolerance)
    gradient = upstream(len(x)).to(dtype)
    actual.backward(gradient)
    expected.backward(gradient.double())
    check(x.grad, x64.grad, tolerance)
    check(weight.grad, weight64.grad, tolerance)


def test_gradients_are_zero_where_memory_was_not() -> None:
    """The gradient of an expert without rows is written, whatever the memory held before."""
    x, weight, ends = arguments(COUNTS["some experts without rows"])
    torch.full((weight.numel(),), float("nan"))  # freed at once; the allocator may hand it out again
    grouped_linear(x, weight, ends).sum().backward()
    assert weight.grad is not None
    assert [bool(expert.any()) for expert in weight.grad] == [False, True, False, False, True, False]


@pytest.mark.parametrize("frozen", [0, 1], ids=["input", "weight"])
def test_a_frozen_argument_costs_nothing(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the other argument is kept, and its product is not computed."""
    x, weight, ends = arguments(COUNTS["uneven"])
    (x, weight)[frozen].requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = grouped_linear(x, weight, ends)
    kept = {tensor.data_ptr() for tensor in saved}
    assert (x, weight)[frozen].data_ptr() in kept and (x, weight)[1 - frozen].data_ptr() not in kept
    called = []
    name = ("_grouped_linear", "_weight_gradient")[frozen]
    monkeypatch.setattr(grouped_linear_module, name, lambda *args: called.append(args))
    y.backward(upstream(len(x)))
    assert not called and (x, weight)[frozen].grad is None
    monkeypatch.undo()
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    grouped_linear_reference(x64, weight64, ends).backward(upstream(len(x)).double())
    check((x, weight)[1 - frozen].grad, (x64, weight64)[1 - frozen].grad, 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_registered_correctly(transposed: bool) -> None:
    """Schema, shapes without values, autograd registration, and tracing, as torch.library checks them."""
    x, weight, ends = arguments(COUNTS["some experts without rows"])
    if transposed:
        weight = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(grouped_linear_module._grouped_linear, (x, weight, ends))
    gradient = upstream(len(x))
    torch.library.opcheck(grouped_linear_module._weight_gradient, (gradient, x.detach(), ends))


def test_the_reference_is_a_loop_over_rows() -> None:
    """The reference itself, spelt out."""
    x, weight, ends = arguments([2, 0, 1], torch.float64)
    expected = torch.stack([weight[0] @ x[0], weight[0] @ x[1], weight[2] @ x[2]])
    assert torch.allclose(grouped_linear_reference(x, weight, ends), expected, rtol=1e-14)
