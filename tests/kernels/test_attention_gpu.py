"""Every attention backend that this GPU and its packages have, against the float64 reference, forward and backward.

The tests without the mark ``slow`` are those of a first run on a GPU, and take about 40 seconds:
``pytest -m "gpu and not slow"``. Without a GPU the same code runs with the backends of a CPU.
"""

import contextlib
import functools
from typing import NamedTuple

import pytest
import torch

from retemper.engine.batch import Batch
from retemper.kernels.attention import (
    BACKENDS,
    Choice,
    UnusableBackend,
    attention,
    choose_attention_backend,
    self_check,
)
from retemper.kernels.attention.blocks import BLOCK_BACKENDS, Block, BlockOptions, attend, attend_backward
from retemper.kernels.attention.per_document import per_document_attention

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
gpu, slow = pytest.mark.gpu, pytest.mark.slow
LAYOUTS = {
    "several": [130, 1, 500, 3, 66, 257],
    "equal": [384, 384, 384],
    "one document": [1000],
    "single-token documents": [1] * 37,
    "one token": [1],
}
FIRST = {"auto", "varlen", "sdpa", "several", "equal"}
WINDOWS = (None, 100)
MORE_WINDOWS = (1, 256, 5000)
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 2e-3}
"""The rounding of the result alone is 2^-9 in bf16; fp32 kernels may use TF32 products."""


def first_run(*names: str) -> list:
    """Parameters, of which all that are not part of a first run are slow."""
    return [pytest.param(name, marks=[] if name in FIRST else slow) for name in names]


each_backend = pytest.mark.parametrize("backend", first_run("auto", *BACKENDS))
each_layout = pytest.mark.parametrize("layout", first_run(*LAYOUTS))
each_dtype = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float32, id="fp32", marks=slow)]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test uses up the graphs of the next."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Problem(NamedTuple):
    """Shapes and options of an attention; its inputs are random."""

    layout: str
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    softcap: float | None = None
    with_sinks: bool = False

    @property
    def lengths(self) -> list[int]:
        return LAYOUTS[self.layout]


@functools.cache
def inputs(problem: Problem) -> list[torch.Tensor]:
    """Queries, keys, values, sinks, and the gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    tokens, sizes = sum(problem.lengths), (problem.head_dim, problem.value_head_dim)
    q, k = ((tokens, heads, sizes[0]) for heads in (problem.heads, problem.kv_heads))
    v, output = ((tokens, heads, sizes[1]) for heads in (problem.kv_heads, problem.heads))
    shapes = (q, k, v, (problem.heads,), output)
    return [torch.randn(shape, generator=generator, device=DEVICE).to(problem.dtype) for shape in shapes]


@functools.lru_cache(maxsize=8)
def reference(problem: Problem, window: int | None) -> list[torch.Tensor]:
    """Output and gradients in float64, once for all backends."""
    return run(
        functools.partial(per_document_attention, lengths=problem.lengths),
        [x.double() for x in inputs(problem)],
        problem,
        window,
    )


def run(function, values: list[torch.Tensor], problem: Problem, window: int | None) -> list[torch.Tensor]:
    """Output and gradients."""
    *leaves, upstream = values
    leaves = [x.clone().requires_grad_() for x in leaves[: 4 if problem.with_sinks else 3]]
    q, k, v, *sinks = leaves
    named = {"softcap": problem.softcap, "sinks": sinks[0] if sinks else None}
    output = function(q, k, v, window=window, **named)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def choose(backend: str, problem: Problem) -> Choice:
    try:
        return choose_attention_backend(
            backend,
            DEVICE,
            problem.dtype,
            problem.head_dim,
            equal_lengths=backend == "sdpa" and len(set(problem.lengths)) == 1,
            value_head_dim=problem.value_head_dim,
            softcap=problem.softcap is not None,
            sinks=problem.with_sinks,
        )
    except UnusableBackend as error:
        pytest.skip(str(error))


def prepared(lengths: list[int], choice: Choice, windows) -> Batch:
    return host_batch(lengths).prepare(
        DEVICE, choice.backend, windows, equal_lengths_backend=choice.equal_lengths_backend
    )


def host_batch(lengths: list[int]) -> Batch:
    batch = Batch.of_documents(torch.zeros(sum(lengths), dtype=torch.int64), lengths)
    return batch.pin_memory() if HAS_GPU else batch


def check(backend: str, problem: Problem, windows) -> None:
    """Compare with the reference: each window as that of all layers of a model."""
    choice, bound = choose(backend, problem), BOUNDS[problem.dtype]
    for window in windows:
        batch = prepared(problem.lengths, choice, [window])
        ours = functools.partial(
            attention, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, plan=batch.attention
        )
        actual, expected = run(ours, inputs(problem), problem, window), reference(problem, window)
        assert actual[0].dtype == problem.dtype
        assert (actual[0].double() - expected[0]).norm() <= bound * expected[0].norm(), (choice, window)
        total = torch.stack([x.norm() for x in expected[1:]]).norm()
        for name, mine, wanted in zip(("dq", "dk", "dv", "dsinks"), actual[1:], expected[1:], strict=False):
            assert (mine.double() - wanted).norm() <= bound * total, (choice, window, name)
    # Eager FlexAttention is as right, and not what is to be tested.
    compiled = HAS_GPU and choice.backend == "flex"
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) is compiled


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_checks_at_the_start_of_a_run_find_nothing(head_dim):
    assert self_check.shared_heads_problem(None, DEVICE, torch.bfloat16, head_dim) is None
    if torch.cuda.get_device_capability() >= (9, 0):
        assert self_check.cudnn_problem(DEVICE, torch.bfloat16, head_dim) is None


@gpu
@each_backend
@each_layout
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (14, 2, 64), (8, 2, 128)])
@each_dtype
def test_values_and_gradients_equal_the_float64_reference(backend, layout, heads, kv_heads, head_dim, dtype):
    check(backend, Problem(layout, heads, kv_heads, head_dim, head_dim, dtype), WINDOWS)


@gpu
@slow
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_windows(backend, layout):
    check(backend, Problem(layout, 4, 2, 64, 64, torch.bfloat16), MORE_WINDOWS)


@gpu
@pytest.mark.parametrize("backend", BLOCK_BACKENDS)
@pytest.mark.parametrize(
    ("block", "window"),
    [
        (Block(0, 0, (130, 1, 500), (130, 1, 500), 0), None),
        (Block(0, 0, (130, 1, 500), (130, 1, 500), 0), 100),
        (Block(0, 0, (300,), (700,), 900), None),
        (Block(0, 0, (300,), (700,), 700), 600),
    ],
)
@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(64, 64), (128, 64)])
def test_blocks_equal_the_float64_reference(backend, block, window, head_dim, value_head_dim):
    """Output, log-sum-exp, and gradients with the log-sum-exp over more keys than those of the block."""
    problem = Problem("one document", 8, 2, head_dim, value_head_dim, torch.bfloat16)
    try:
        name = choose_attention_backend(
            backend, DEVICE, problem.dtype, head_dim, value_head_dim=value_head_dim, in_blocks=True
        ).backend
    except UnusableBackend as error:
        pytest.skip(str(error))
    q, k, v, _, upstream = inputs(problem)
    q, upstream = q[block.queries], upstream[block.queries]
    k, v = k[block.keys], v[block.keys]
    wide = [x.double() for x in (q, k, v)]
    exact, ours = (BlockOptions(one, head_dim**-0.5, window) for one in ("per_document", name))
    wanted = attend(*wide, block, exact)
    actual = attend(q, k, v, block, ours)
    lse = wanted[1] + 0.5
    wanted += attend_backward(upstream.double(), *wide, wanted[0], lse, block, exact)
    actual += attend_backward(upstream, q, k, v, wanted[0].bfloat16(), lse.float(), block, ours)
    for mine, other in zip(actual, wanted, strict=True):
        assert (mine.double() - other).norm() <= 1e-2 * other.norm()


@gpu
@each_backend
@each_layout
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "head_dim", "value_head_dim"),
    [
        (None, False, 192, 128),
        (None, False, 64, 96),
        pytest.param(5.0, False, 64, 64, marks=slow),
        pytest.param(None, True, 64, 64, marks=slow),
        pytest.param(5.0, True, 64, 32, marks=slow),
    ],
)
@each_dtype
def test_options_equal_the_float64_reference(
    backend, layout, window, softcap, with_sinks, head_dim, value_head_dim, dtype
):
    check(backend, Problem(layout, 4, 2, head_dim, value_head_dim, dtype, softcap, with_sinks), [window])


@contextlib.contextmanager
def no_waiting():
    """Copies from memory that is not pinned wait, and so does reading a number."""
    if not HAS_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_without_waiting(backend: str) -> None:
    problem = Problem("equal" if backend == "sdpa" else "several", 4, 2, 64, 64, torch.bfloat16)
    choice = choose(backend, problem)
    packings = {"sdpa": ([256, 256], [256, 256])}.get(backend, ([300, 100, 112], [200, 300, 12], [128] * 4))
    batches = [host_batch(lengths) for lengths in packings]
    generator = torch.Generator(DEVICE).manual_seed(3)
    shapes = ((512, heads, 64) for heads in (4, 2, 2, 4))
    *tensors, upstream = (torch.randn(x, generator=generator, device=DEVICE).bfloat16() for x in shapes)
    tensors = [x.requires_grad_() for x in tensors]

    def layer(batch: Batch) -> None:
        batch = batch.prepare(DEVICE, choice.backend, [None], equal_lengths_backend=choice.equal_lengths_backend)
        for window in (None, 100):  # the second one was not planned
            output = attention(*tensors, batch.cu_seqlens, batch.max_seqlen, window=window, plan=batch.attention)
            output.backward(upstream)

    for batch in batches:  # compiles and loads what is needed
        layer(batch)
    with no_waiting():
        for batch in batches:
            layer(batch)


@gpu
@each_backend
def test_nothing_waits_for_the_device(backend):
    """Neither a new packing nor a layer's forward and backward pass."""
    step_without_waiting(backend)


@gpu
@slow
def test_packings_share_one_compiled_flex_kernel():
    choice = choose("flex", Problem("several", 4, 2, 64, 64, torch.bfloat16))
    *tensors, _, _ = inputs(Problem("several", 4, 2, 64, 64, torch.bfloat16))
    counts, total = [], len(tensors[0])
    for lengths in ([total], [total - 12, 12], [1] * total, [100, 200, total - 300]):
        batch = prepared(lengths, choice, [None])
        attention(*tensors, batch.cu_seqlens, batch.max_seqlen, plan=batch.attention)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [1] * 4


def compiled_step(choice: Choice, backend: str) -> int:
    """Compare compiled with eager attention of mixed packings; return the number of graphs."""

    def layer(q, k, v, batch: Batch):
        return attention(q * 2, k, v * 2, batch.cu_seqlens, batch.max_seqlen, plan=batch.attention) * 2

    compiled = torch.compile(layer, backend=backend)
    shapes = ((512, heads, 64) for heads in (14, 2, 2))
    generator = torch.Generator(DEVICE).manual_seed(3)
    values = [torch.randn(x, generator=generator, device=DEVICE).bfloat16() for x in shapes]
    for lengths in ([300, 100, 112], [128] * 4, [500, 12], [128] * 4):
        batch = prepared(lengths, choice, [None])
        torch._dynamo.maybe_mark_dynamic(batch.cu_seqlens, 0)
        results = []
        for function in (layer, compiled):
            leaves = [x.clone().requires_grad_() for x in values]
            output = function(*leaves, batch)
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
        for eager, other in zip(*results, strict=True):
            assert (eager.double() - other.double()).norm() <= 1e-2 * eager.double().norm()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@gpu
def test_compiled_attention_of_mixed_packings():
    """One graph with varlen_attn, whose longest document is a constant at first, and one with cuDNN."""
    choice = choose("auto", Problem("several", 14, 2, 64, 64, torch.bfloat16))
    if choice.backend != "varlen" or choice.equal_lengths_backend is None:
        pytest.skip(choice.reason)
    assert compiled_step(choice, "inductor") == 3


# ----------------------------------------------------------------------------------------------------------------------
# The same code without a GPU


@pytest.mark.parametrize("backend", ["auto", "per_document", "sdpa"])
@pytest.mark.parametrize("options", [(24, torch.float32, 5.0, True), (16, torch.bfloat16)], ids=["options", "plain"])
def test_rehearse_the_comparison(backend, options):
    problem = Problem("equal", 4, 2, 16, *options)
    check(backend, problem, (None, 100))
    output, *gradients = reference(problem, 100)
    assert [x.shape for x in gradients] == [x.shape for x in inputs(problem)[: len(gradients)]]
    assert output.dtype == torch.float64


def test_rehearse_that_a_wrong_result_is_found(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "wrong", [3, 4])
    problem = Problem("wrong", 4, 2, 16, 16, torch.float32)
    reference(problem, None)
    LAYOUTS["wrong"] = [4, 3]
    with pytest.raises(AssertionError):
        check("per_document", problem, [None])
    inputs.cache_clear()
    reference.cache_clear()


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_rehearse_a_step(backend):
    step_without_waiting(backend)


def test_rehearse_compiled_packings():
    compiled_step(Choice("per_document", "", "sdpa"), "eager")
