"""Soft cap, sinks, and values of another head size, against an explicit float64 softmax over every document."""

import itertools
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from oracles.packed_attention import documented_varlen, explicit_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator
from torch.nn.attention.flex_attention import AuxOutput, flex_attention

from retemper.kernels.attention import AttentionPlan, attention, flash, per_document_attention, plan_attention

CPU = torch.device("cpu")
LAYOUTS = {
    "one document": [17],
    "several": [5, 1, 9, 2],
    "equal": [6, 6, 6],
    "single-token documents": [1, 1, 1],
}
WINDOWS = [None, 1, 3, 100]
OPTIONS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "larger values": {"value_head_dim": 12},
    "smaller values": {"value_head_dim": 4},
    "all": {"softcap": 1.5, "sinks": True, "value_head_dim": 4, "softmax_scale": 0.7},
}
"""``sinks``: random ones."""


def make_inputs(lengths, heads, kv_heads, head_dim=8, value_head_dim=None, sinks=False, dtype=torch.float32):
    """(q, k, v, sinks or None), all with gradients."""
    generator = torch.Generator().manual_seed(3)
    tokens, width = sum(lengths), value_head_dim or head_dim
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, width), (heads,)]
    q, k, v, logits = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v, logits if sinks else None


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check(plan, lengths, heads, kv_heads, window, options, with_gradients=("q", "k", "v", "sinks")):
    """The attention of ``plan`` in fp32 against the oracle: outputs and the gradients of these inputs."""
    options = dict(options)
    inputs = make_inputs(lengths, heads, kv_heads, 8, options.pop("value_head_dim", None), options.pop("sinks", False))
    names = ("q", "k", "v", "sinks")
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    scale, softcap = options.get("softmax_scale"), options.get("softcap")
    expected = explicit_attention(*doubles[:3], lengths, window, scale, softcap, doubles[3])
    tensors = [x if name in with_gradients or x is None else x.detach() for name, x in zip(names, inputs, strict=True)]
    output = attention(
        *tensors[:3], offsets(lengths), max(lengths), window=window, sinks=tensors[3], plan=plan, **options
    )
    assert output.shape == expected.shape
    assert output.dtype == torch.float32
    assert (output - expected).norm() <= 1e-6 * expected.norm()
    if not output.requires_grad:
        return
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    output.backward(upstream)
    expected.backward(upstream.double())
    total = torch.stack([x.grad.norm() for x in doubles if x is not None]).norm()
    for name, actual, wanted in zip(names, inputs, doubles, strict=True):
        if actual is not None and name in with_gradients:
            assert (actual.grad - wanted.grad).norm() <= 1e-6 * total, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        (backend, layout)
        for backend in (None, "per_document", "sdpa", "flex")
        for layout, lengths in LAYOUTS.items()
        if backend != "sdpa" or len(set(lengths)) == 1  # which is for documents of one length
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_options_equal_the_explicit_softmax(backend, layout, heads, kv_heads, options):
    lengths = LAYOUTS[layout]
    plan = None if backend is None else plan_attention(backend, offsets(lengths), WINDOWS, CPU)
    # FlexAttention has no backward pass on a CPU; the sinks are outside of it.
    gradients = ("sinks",) if backend == "flex" else ("q", "k", "v", "sinks")
    for window in WINDOWS:
        check(plan, lengths, heads, kv_heads, window, options, gradients)


def flex_with_gradients(q, k, v, *, block_mask, scale, enable_gqa, score_mod=None, return_aux=None):
    """``flex_attention`` without its refusal of gradients on a CPU: the operator that it calls has them."""
    options = {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score_mod = score_mod or (lambda score, batch, head, query, key: score)
    output, log2_sum, _ = flex_attention_operator(q, k, v, score_mod, block_mask.as_tuple(), scale, options)
    return output if return_aux is None else (output, AuxOutput(lse=log2_sum * math.log(2)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_flex_attention(layout, options):
    lengths = LAYOUTS[layout]
    plan = plan_attention("flex", offsets(lengths), WINDOWS, CPU)
    for window in WINDOWS:
        check(replace(plan, function=flex_with_gradients), lengths, 4, 2, window, options)


def test_packings_share_the_graphs_of_a_compiled_block():
    """One for each window, with a soft cap and sinks, and without a graph break."""
    inputs = [x.detach() for x in make_inputs([20], 4, 2, sinks=True)]
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(attention, backend=graphs, fullgraph=True)
    for lengths in ([20], [5, 15], [12, 1, 7]):
        plan = plan_attention("flex", offsets(lengths), [None, 3], CPU)
        for window in (None, 3):
            options = {"softcap": 1.5, "window": window, "sinks": inputs[3]}
            output = compiled(*inputs[:3], offsets([20]), 20, plan=plan, **options)
            assert torch.allclose(output, per_document_attention(*inputs[:3], lengths, **options), atol=1e-6)
    torch._dynamo.reset()
    assert graphs.frame_count == 2


def test_a_compiled_block_may_use_a_window_that_was_not_planned():
    inputs = [x.detach() for x in make_inputs([20], 4, 2)[:3]]
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager")
    for lengths in ([20], [5, 15]):
        plan = plan_attention("flex", offsets(lengths), [None], CPU)
        output = compiled(*inputs, offsets(lengths), 20, window=3, plan=plan)
        assert torch.allclose(output, per_document_attention(*inputs, lengths, window=3), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_flex_attention_has_a_soft_cap_and_other_values():
    """On a CPU only the forward pass without the log-sum-exp can be compiled."""
    lengths = [130, 1, 100, 69]
    plan = plan_attention("flex", offsets(lengths), [None], CPU)
    plan = replace(plan, function=torch.compile(flex_attention, dynamic=False))
    q, k, v, _ = (None if x is None else x.detach() for x in make_inputs(lengths, 4, 2, 16, 32))
    output = attention(q, k, v, offsets(lengths), 130, softcap=1.5, plan=plan)
    expected = explicit_attention(q.double(), k.double(), v.double(), lengths, None, None, 1.5)
    assert (output - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("options", [OPTIONS["softcap"], OPTIONS["larger values"], OPTIONS["smaller values"]])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_attn_is_called_as_its_documentation_has_it(monkeypatch, layout, kv_heads, options):
    """The kernels need a GPU: here a slow function of the documented meaning stands in their place."""

    def package_function(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
    ):
        right = 0 if causal else window_size[1]
        return documented_varlen(q, k, v, cu_q, max_q, softmax_scale, window_size[0], right, softcap)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = lambda q, k, v, **named: package_function(
        q, k, v, *(named.pop(f"{name}_{side}") for name in ("cu_seqlens", "max_seqlen") for side in "qk"), **named
    )
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    lengths = LAYOUTS[layout]
    for window in WINDOWS:
        check(plan_attention("flash_attn", offsets(lengths), [], CPU), lengths, 4, kv_heads, window, options)


@pytest.mark.parametrize("options", [OPTIONS["larger values"], OPTIONS["smaller values"]])
def test_varlen_attn_gets_one_head_size(monkeypatch, options):
    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return documented_varlen(q, k, v, cu_q, max_q, scale, *window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(flash, "VARLEN_HAS_ENABLE_GQA", True)
    monkeypatch.setattr(flash, "_shares_heads", True)
    for lengths in LAYOUTS.values():
        check(plan_attention("varlen", offsets(lengths), [], CPU), lengths, 4, 2, 3, options)


@pytest.mark.parametrize(
    ("backend", "options"),
    [("varlen", {"softcap": 1.5}), ("fa3", {"sinks": torch.zeros(4)}), ("flash_attn", {"sinks": torch.zeros(4)})],
)
def test_an_option_is_never_ignored(backend, options):
    q, k, v, _ = make_inputs([4], 4, 2)
    plan = AttentionPlan(backend)
    with pytest.raises(ValueError, match=f"attention by {backend} has no {next(iter(options))}"):
        attention(q, k, v, offsets([4]), 4, plan=plan, **options)


@pytest.mark.parametrize("backend", ["per_document", "sdpa"])
def test_scores_of_bf16_inputs_are_not_rounded(backend):
    """Only inputs and output are bf16: the error is that of rounding the output."""
    lengths = [40, 40]
    q, k, v, sinks = make_inputs(lengths, 4, 2, 64, sinks=True, dtype=torch.bfloat16)
    plan = plan_attention(backend, offsets(lengths), [None], CPU)
    output = attention(q, k, v, offsets(lengths), 40, softcap=30.0, sinks=sinks, plan=plan)
    doubles = (x.detach().double() for x in (q, k, v))
    expected = explicit_attention(*doubles, lengths, None, None, 30.0, sinks.detach().double())
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() <= 1.01 * (expected.bfloat16().double() - expected).norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_masks_of_windows_that_were_not_planned():
    lengths = LAYOUTS["several"]
    plan = plan_attention("flex", offsets(lengths), [None], CPU)
    assert plan.masks.keys() == {None}
    check(plan, lengths, 4, 2, 3, {}, with_gradients=())
    assert plan.mask(3) is plan.masks[3]
    assert plan.masks.keys() == {None, 3}
