"""Packed causal attention against an explicit float64 softmax over every document by itself."""

import functools
import itertools
import sys
import types
from dataclasses import replace

import pytest
import torch
from oracles.packed_attention import documented_varlen, explicit_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend

from retemper.kernels import attention as package
from retemper.kernels.attention import (
    attention,
    flash,
    pad_offsets,
    per_document,
    per_document_attention,
    plan_attention,
)
from retemper.kernels.attention.plan import _flex_function

CPU = torch.device("cpu")
LAYOUTS = {
    "one document": [17],
    "several": [5, 1, 9, 2],
    "equal": [6, 6, 6],
    "single-token documents": [1, 1, 1],
}
WINDOWS = [(None, None), (1, None), (3, 0.5), (9, None), (17, None), (100, None)]


def make_inputs(lengths: list[int], heads: int, kv_heads: int, head_dim: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(sum(lengths), n, head_dim, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check(run, lengths, heads, kv_heads, window, scale, gradients=True):
    """``run(q, k, v)`` in fp32 against the float64 oracle, outputs and gradients."""
    inputs = make_inputs(lengths, heads, kv_heads)
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected = explicit_attention(*doubles, lengths, window, scale)
    output = run(*(inputs if gradients else (x.detach() for x in inputs)))
    assert output.shape == expected.shape
    assert output.dtype == torch.float32
    assert (output - expected).norm() <= 1e-6 * expected.norm()
    if not gradients:
        return
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    output.backward(upstream)
    expected.backward(upstream.double())
    total = torch.stack([x.grad.norm() for x in doubles]).norm()
    for name, actual, wanted in zip("qkv", inputs, doubles, strict=True):
        # Where each token sees only itself, the gradients of q and k are exactly zero and rounding is all there is:
        # the error is measured against the gradient of all inputs.
        assert (actual.grad - wanted.grad).norm() <= 1e-6 * total, name


@pytest.mark.parametrize(
    ("backend", "layout"),
    [
        (backend, layout)
        for backend in (None, "per_document", "sdpa", "flex")
        for layout, lengths in LAYOUTS.items()
        if backend != "sdpa" or len(set(lengths)) == 1  # which is for documents of one length
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_values_and_gradients_equal_the_explicit_softmax(backend, padding, layout, heads, kv_heads):
    """Every backend that a CPU can run. ``padding``: documents of no tokens behind the others."""
    lengths = LAYOUTS[layout]
    cu = offsets(lengths + [0] * padding)
    plan = None if backend is None else plan_attention(backend, cu, [window for window, _ in WINDOWS], CPU)
    for window, scale in WINDOWS:
        options = {"softmax_scale": scale, "window": window, "plan": plan}
        check(
            lambda q, k, v, options=options: attention(q, k, v, cu, max(lengths), **options),
            lengths,
            heads,
            kv_heads,
            window,
            scale,
            gradients=backend != "flex",  # PyTorch's has none on a CPU
        )


@pytest.mark.parametrize(
    "package_name", ["flash_attn", "varlen of torch 2.11", "varlen of torch 2.11, checked", "varlen of torch 2.13"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_kernels_are_called_as_their_documentation_has_it(monkeypatch, package_name, layout, kv_heads):
    """The kernels need a GPU: here a slow function of the documented meaning stands in their place."""
    lengths = LAYOUTS[layout]

    def package_function(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ):
        assert cu_seqlens_q is cu_seqlens_k
        right = 0 if causal else window_size[1]
        longest = min(max_seqlen_q, max_seqlen_k)
        return documented_varlen(q, k, v, cu_seqlens_q, longest, softmax_scale, window_size[0], right)

    def varlen_of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        # Its documentation knows one number of heads.
        assert k.shape[1] == v.shape[1] == (kv_heads if package_name.endswith("checked") else q.shape[1])
        return documented_varlen(q, k, v, cu_q, min(max_q, max_k), scale, *window_size)

    def varlen_of_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return documented_varlen(q, k, v, cu_q, min(max_q, max_k), scale, *window_size)

    if package_name == "flash_attn":
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = package_function
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        backend = "flash_attn"
    else:
        new = package_name.endswith("13")
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_2_13 if new else varlen_of_2_11)
        monkeypatch.setattr(flash, "VARLEN_HAS_ENABLE_GQA", new)
        monkeypatch.setattr(flash, "_shares_heads", not package_name.endswith("11"))
        backend = "varlen"
    cu = pad_offsets(offsets(lengths))
    plan = plan_attention(backend, cu, [None], CPU)
    for window, scale in WINDOWS:
        options = {"softmax_scale": scale, "window": window, "plan": plan}
        check(
            lambda q, k, v, options=options: attention(q, k, v, cu, max(lengths), **options),
            lengths,
            4,
            kv_heads,
            window,
            scale,
        )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["per_document", "sdpa"])
def test_bf16_stays_bf16(backend, window):
    lengths = [5, 5, 5] if backend == "sdpa" else [5, 1, 9]
    inputs = tuple(x.detach().bfloat16() for x in make_inputs(lengths, 4, 2))
    plan = plan_attention(backend, offsets(lengths), [window], CPU)
    output = attention(*inputs, offsets(lengths), max(lengths), window=window, plan=plan)
    expected = explicit_attention(*(x.double() for x in inputs), lengths, window, None)
    assert output.dtype == torch.bfloat16
    assert (output.double() - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("changed", range(4))
@pytest.mark.parametrize(("backend", "lengths"), [("per_document", [5, 1, 9, 2]), ("sdpa", [4, 4, 4, 4])])
def test_a_document_never_sees_its_neighbour(backend, lengths, window, changed):
    """Another document's inputs, even not-a-number, change no bit of an output or of a gradient."""
    cu = offsets(lengths)
    part = slice(int(cu[changed]), int(cu[changed + 1]))
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[part] = False
    plan = plan_attention(backend, cu, [window], CPU)

    def run(disturb: bool) -> list[Tensor]:
        inputs = make_inputs(lengths, 4, 2)
        if disturb:
            with torch.no_grad():
                for x in inputs:
                    x[part] = torch.nan
        output = attention(*inputs, cu, max(lengths), window=window, plan=plan)
        output[others].square().sum().backward()
        return [output.detach(), *(x.grad for x in inputs)]

    for calm, disturbed in zip(run(False), run(True), strict=True):
        assert torch.equal(calm[others], disturbed[others])
        assert torch.isfinite(calm).all()


def test_the_future_is_not_seen():
    lengths = [9]
    inputs = make_inputs(lengths, 4, 2)
    before = per_document_attention(*inputs, lengths).detach()
    with torch.no_grad():
        for x in inputs:
            x[6:] = torch.randn(x[6:].shape)
    after = per_document_attention(*inputs, lengths).detach()
    torch.testing.assert_close(before[:6], after[:6], rtol=0, atol=1e-6)
    assert (before[6:] - after[6:]).abs().max() > 1e-2


def test_a_plan_changes_no_bit_on_a_cpu():
    lengths = [5, 1, 9, 2]
    inputs = tuple(x.detach() for x in make_inputs(lengths, 4, 2))
    plan = plan_attention("per_document", offsets(lengths), [None], CPU)
    planned = attention(*inputs, offsets(lengths), 9, plan=plan)
    assert torch.equal(planned, attention(*inputs, offsets(lengths), 9))


@pytest.mark.parametrize(
    ("lengths", "windows", "expected"),
    [
        ([6, 6, 6], [None], "sdpa"),
        ([17], [None], "sdpa"),
        ([6, 6, 0, 0], [None], "sdpa"),
        ([6, 6, 6], [None, 6], "sdpa"),
        ([6, 6, 6], [None, 5], "varlen"),
        ([6, 6, 5], [None], "varlen"),
    ],
)
def test_a_packing_of_one_length_has_its_own_backend(lengths, windows, expected):
    plan = plan_attention("varlen", offsets(lengths), windows, CPU, equal_lengths_backend="sdpa")
    assert plan.backend == expected
    assert plan.num_documents == (sum(length > 0 for length in lengths) if expected == "sdpa" else 0)
    assert plan_attention("varlen", offsets(lengths), windows, CPU).backend == "varlen"


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(("backend", "window"), [("sdpa", None), ("sdpa", 6), ("sdpa", 5), ("per_document", 5)])
def test_cudnn_gets_no_mask_and_only_documents_of_one_length(monkeypatch, works, backend, window):
    """A GPU is pretended: the kernels that PyTorch may use are those of its flags."""
    seen, lengths = [], [6, 6, 6]

    def sdpa_kernel(kernels, set_priority):
        seen.append(kernels)
        return torch.nn.attention.sdpa_kernel(kernels, set_priority)

    monkeypatch.setattr(per_document, "on_gpu", lambda x: True)
    monkeypatch.setattr(per_document, "_uses_cudnn", works)
    monkeypatch.setattr(
        per_document, "sdpa_kernel", lambda *args, **kw: seen.append(args[0]) or sdpa_kernel(*args, **kw)
    )
    plan = plan_attention(backend, offsets(lengths), [window], CPU)
    check(lambda *x: attention(*x, offsets(lengths), 6, window=window, plan=plan), lengths, 4, 2, window, None)
    allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if works and backend == "sdpa" and window != 5:
        allowed.insert(0, SDPBackend.CUDNN_ATTENTION)
    assert seen
    assert all(kernels == allowed for kernels in seen)


def test_documents_of_different_lengths_are_no_batch():
    with pytest.raises(ValueError, match=r"sdpa is for documents of one length, not \[2, 5\]"):
        plan_attention("sdpa", offsets([5, 2, 5]), [None], CPU)


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [
        ([4], [0, 4]),
        ([4, 2], [0, 4, 6]),
        ([1, 2, 3], [0, 1, 3, 6, 6]),
        ([1] * 5, [0, 1, 2, 3, 4, 5, 5, 5, 5]),
        ([1] * 8, [*range(9)]),
    ],
)
def test_offsets_are_padded_to_a_power_of_two_of_documents(lengths, padded):
    result = pad_offsets(offsets(lengths))
    assert result.tolist() == padded
    assert result.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 1, 2, 64, 128, 129, 300, 1000])
def test_block_masks_equal_those_that_pytorch_finds_by_looking_at_every_pair(window):
    from torch.nn.attention.flex_attention import create_block_mask

    from retemper.kernels.attention.flex import make_block_mask

    def key_blocks(mask, kind: str) -> list[set[int]]:
        numbers, indices = (getattr(mask, f"{kind}_{part}")[0, 0] for part in ("num_blocks", "indices"))
        return [set(row[:number].tolist()) for number, row in zip(numbers, indices, strict=True)]

    for lengths in ([5], [128], [129], [1] * 300, [256, 256], [700], [130, 1, 500, 3, 66], [384, 128, 600, 5]):
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

        def visible(batch, head, query, key, document=document):
            seen = (document[query] == document[key]) & (key <= query)
            return seen if window is None else seen & (query - key < window)

        expected = create_block_mask(visible, None, None, len(document), len(document), device="cpu")
        actual = make_block_mask(lengths, window, CPU)
        for kind in ("kv", "full_kv", "q", "full_q"):
            assert key_blocks(actual, kind) == key_blocks(expected, kind), (lengths, kind)
        assert actual.seq_lengths == expected.seq_lengths
        places = torch.arange(len(document))
        pairs = (0, 0, places[:, None], places[None, :])
        assert torch.equal(actual.mask_mod(*pairs), visible(*pairs))


@pytest.mark.slow
def test_compiled_flex_attention_reads_the_blocks():
    """On a CPU only the forward pass can be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    from retemper.kernels.attention.flex import block_masked_attention, make_block_mask

    compiled = torch.compile(flex_attention, dynamic=False)
    for lengths, window in (([130, 1, 100, 69], None), ([100, 200], None), ([140, 160], 7)):
        inputs = tuple(x.detach() for x in make_inputs(lengths, 4, 2, head_dim=16))
        output = block_masked_attention(*inputs, make_block_mask(lengths, window, CPU), function=compiled)
        expected = explicit_attention(*(x.double() for x in inputs), lengths, window, None)
        assert (output - expected).norm() <= 1e-6 * expected.norm()


def test_flex_attention_stays_compiled_for_any_kind_of_layer(monkeypatch):
    """Without the fused kernel it would form all scores, and say nothing. A GPU is pretended."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()

    def attend(head_dim):
        q, k, v = (x.detach() for x in make_inputs([5, 3], 4, 2, head_dim))
        attention(q, k, v, offsets([5, 3]), 5, plan=plan)

    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = _flex_function.__wrapped__("cuda")
        plan = replace(plan_attention("flex", offsets([5, 3]), [None], CPU), function=compiled)
        for head_dim in range(16, 20):
            attend(head_dim)
        assert counter.frame_count == 4
        torch._dynamo.config.recompile_limit = 4
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(20)
    torch._dynamo.reset()


def test_every_backend_has_a_description():
    from typing import get_args, get_type_hints

    from retemper.engine.config.settings import TrainingConfig

    choices = get_args(get_type_hints(TrainingConfig)["attention_backend"])
    assert choices == ("auto", *package.BACKENDS)
