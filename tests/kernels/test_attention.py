"""Packed causal attention against an explicit float64 softmax over every document by itself."""

import itertools

import pytest
import torch
from torch import Tensor

from retemper.kernels.attention import attention, per_document_attention

LAYOUTS = {
    "one document": [17],
    "several": [5, 1, 9, 2],
    "single-token documents": [1, 1, 1, 1],
}


def make_inputs(lengths: list[int], heads: int, kv_heads: int, head_dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(sum(lengths), n, head_dim, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None, scale: float | None) -> Tensor:
    """One query at a time: softmax over the keys that its document, causality and the window leave it."""
    outputs = []
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    start = 0
    for length in lengths:
        for place in range(length):
            first = start if window is None else max(start, start + place - window + 1)
            last = start + place + 1
            rows = []
            for head in range(q.shape[1]):
                keys, values = k[first:last, head // group], v[first:last, head // group]
                weights = torch.softmax(keys @ q[start + place, head] * scale, dim=0)
                rows.append(weights @ values)
            outputs.append(torch.stack(rows))
        start += length
    return torch.stack(outputs)


@pytest.mark.parametrize("implementation", [attention, per_document_attention])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("window", "scale"), [(None, None), (1, None), (3, 0.5), (9, None), (17, None), (100, None)])
def test_values_and_gradients_equal_the_explicit_softmax(implementation, layout, heads, kv_heads, window, scale):
    lengths = LAYOUTS[layout]
    inputs = make_inputs(lengths, heads, kv_heads)
    arguments = (max(lengths),) if implementation is attention else ()
    output = implementation(*inputs, offsets(lengths), *arguments, softmax_scale=scale, window=window)
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = reference(*doubles, lengths, window, scale)
    assert output.shape == expected.shape
    assert output.dtype == torch.float32
    assert (output - expected).norm() <= 1e-6 * expected.norm()

    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    output.backward(upstream)
    expected.backward(upstream.double())
    total = torch.stack([x.grad.norm() for x in doubles]).norm()
    for name, actual, wanted in zip("qkv", inputs, doubles, strict=True):
        # Where each token sees only itself, the gradients of q and k are exactly zero and rounding is all there is:
        # the error is measured against the gradient of all inputs.
        assert (actual.grad - wanted.grad).norm() <= 1e-6 * total, name


@pytest.mark.parametrize("window", [None, 3])
def test_bf16_stays_bf16(window):
    lengths = [5, 1, 9]
    inputs = tuple(x.detach().bfloat16() for x in make_inputs(lengths, 4, 2))
    output = per_document_attention(*inputs, offsets(lengths), window=window)
    expected = reference(*(x.double() for x in inputs), lengths, window, None)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("changed", range(4))
def test_a_document_never_sees_its_neighbour(window, changed):
    """Another document's inputs, even not-a-number, change no bit of an output or of a gradient."""
    lengths = [5, 1, 9, 2]
    cu = offsets(lengths)
    part = slice(int(cu[changed]), int(cu[changed + 1]))
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[part] = False

    def run(disturb: bool) -> list[Tensor]:
        inputs = make_inputs(lengths, 4, 2)
        if disturb:
            with torch.no_grad():
                for x in inputs:
                    x[part] = torch.nan
        output = per_document_attention(*inputs, cu, window=window)
        output[others].square().sum().backward()
        return [output.detach(), *(x.grad for x in inputs)]

    for calm, disturbed in zip(run(False), run(True), strict=True):
        assert torch.equal(calm[others], disturbed[others])
        assert torch.isfinite(calm).all()


def test_the_future_is_not_seen():
    lengths = [9]
    inputs = make_inputs(lengths, 4, 2)
    before = per_document_attention(*inputs, offsets(lengths)).detach()
    with torch.no_grad():
        for x in inputs:
            x[6:] = torch.randn(x[6:].shape)
    after = per_document_attention(*inputs, offsets(lengths)).detach()
    torch.testing.assert_close(before[:6], after[:6], rtol=0, atol=1e-6)
    assert (before[6:] - after[6:]).abs().max() > 1e-2
