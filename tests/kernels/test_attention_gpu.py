"""Every attention backend that this GPU and its packages have, against the float64 reference, forward and backward."""

import pytest
import torch

from retemper.engine.batch import Batch
from retemper.kernels.attention import BACKENDS, UnusableBackend, attention, choose_attention_backend
from retemper.kernels.attention.per_document import per_document_attention

pytestmark = pytest.mark.gpu
LAYOUTS = {
    "one document": [1000],
    "several": [130, 1, 500, 3, 66, 257],
    "equal": [384, 384, 384],
    "single-token documents": [1] * 37,
    "one token": [1],
}
WINDOWS = [None, 1, 100, 256, 5000]


def plan(lengths, backend, windows):
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    return Batch.of_documents(tokens, lengths).prepare(torch.device("cuda"), backend, windows)


def choose(backend, lengths, dtype, head_dim, **needs):
    try:
        return choose_attention_backend(
            backend, torch.device("cuda"), dtype, head_dim, equal_lengths=len(set(lengths)) == 1, **needs
        ).backend
    except UnusableBackend as problem:
        pytest.skip(str(problem))


def inputs(num_tokens, heads, kv_heads, head_dim, dtype):
    generator = torch.Generator("cuda").manual_seed(3)
    shapes = ((num_tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads))
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (14, 2, 64), (8, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients_equal_the_float64_reference(backend, layout, heads, kv_heads, head_dim, dtype):
    lengths = LAYOUTS[layout]
    backend = choose(backend, lengths, dtype, head_dim)
    packing = plan(lengths, backend, WINDOWS)
    *tensors, upstream = inputs(sum(lengths), heads, kv_heads, head_dim, dtype)
    # The rounding of the result alone is 2^-9 in bf16; fp32 kernels may use TF32 products.
    bound = {torch.bfloat16: 1e-2, torch.float32: 2e-3}[dtype]
    for window in WINDOWS:
        actual = [x.clone().requires_grad_() for x in tensors]
        output = attention(*actual, packing.cu_seqlens, packing.max_seqlen, window=window, plan=packing.attention)
        output.backward(upstream)
        doubles = [x.double().cpu().requires_grad_() for x in tensors]
        expected = per_document_attention(*doubles, lengths, window=window)
        expected.backward(upstream.double().cpu())
        assert output.dtype == dtype
        assert (output.double().cpu() - expected).norm() <= bound * expected.norm(), (backend, window)
        total = torch.stack([x.grad.norm() for x in doubles]).norm()
        for name, ours, wanted in zip("qkv", actual, doubles, strict=True):
            assert (ours.grad.double().cpu() - wanted.grad).norm() <= bound * total, (backend, window, name)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "head_dim", "value_head_dim"),
    [(5.0, False, 64, 64), (None, True, 64, 64), (None, False, 192, 128), (None, False, 64, 96), (5.0, True, 64, 32)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options_equal_the_float64_reference(
    backend, layout, window, softcap, with_sinks, head_dim, value_head_dim, dtype
):
    lengths = LAYOUTS[layout]
    needs = {"softcap": softcap is not None, "sinks": with_sinks, "value_head_dim": value_head_dim}
    backend = choose(backend, lengths, dtype, head_dim, **needs)
    packing = plan(lengths, backend, [window])
    generator = torch.Generator("cuda").manual_seed(3)
    tokens = sum(lengths)
    shapes = [(tokens, 4, head_dim), (tokens, 2, head_dim), (tokens, 2, value_head_dim), (4,)]
    inputs = [torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    doubles = [x.detach().double().cpu().requires_grad_() for x in inputs]
    options = {"window": window, "softcap": softcap}
    sinks, wanted_sinks = (inputs[3], doubles[3]) if with_sinks else (None, None)
    offsets = packing.cu_seqlens, packing.max_seqlen
    output = attention(*inputs[:3], *offsets, sinks=sinks, plan=packing.attention, **options)
    expected = per_document_attention(*doubles[:3], lengths, sinks=wanted_sinks, **options)
    upstream = torch.randn(output.shape, generator=generator, device="cuda").to(dtype)
    output.backward(upstream)
    expected.backward(upstream.double().cpu())
    bound = {torch.bfloat16: 1e-2, torch.float32: 2e-3}[dtype]
    assert output.dtype == dtype
    assert (output.double().cpu() - expected).norm() <= bound * expected.norm()
    pairs = [pair for pair in zip(inputs, doubles, strict=True) if pair[1].grad is not None]
    total = torch.stack([wanted.grad.norm() for _, wanted in pairs]).norm()
    for actual, wanted in pairs:
        assert (actual.grad.double().cpu() - wanted.grad).norm() <= bound * total


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_nothing_waits_for_the_device(backend):
    """Neither a new packing nor a layer's forward and backward pass."""
    first, second = [300, 100, 112], [200, 300, 12]
    if backend == "sdpa":
        first = second = [256, 256]
    backend = choose(backend, first, torch.bfloat16, 64)
    *tensors, upstream = inputs(512, 4, 2, 64, torch.bfloat16)
    tensors = [x.requires_grad_() for x in tensors]

    def layer(lengths):
        packing = plan(lengths, backend, [None])
        for window in (None, 100):  # the second one was not planned
            output = attention(*tensors, packing.cu_seqlens, packing.max_seqlen, window=window, plan=packing.attention)
            output.backward(upstream)

    layer(first)  # compiles and loads what is needed
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packings_share_one_compiled_flex_kernel():
    backend = choose("flex", [1, 2], torch.bfloat16, 64)
    *tensors, _ = inputs(512, 4, 2, 64, torch.bfloat16)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        counts = []
        for lengths in ([512], [500, 12], [1] * 512, [100, 200, 212]):
            packing = plan(lengths, backend, [None])
            attention(*tensors, packing.cu_seqlens, packing.max_seqlen, plan=packing.attention)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == counts[:1] * 4
