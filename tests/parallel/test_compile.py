"""Compiled blocks: the numbers of eager ones, few graphs for any number of blocks and documents."""

from __future__ import annotations

import shutil

import packed_model
import pytest
import torch
from packed_model import MIXTURES, gradients, packed, tiny_decoder
from torch._dynamo.testing import CompileCounterWithBackend

from retemper.engine.config.settings import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.model import decoder as decoder_module
from retemper.engine.parallel import compile as block_compile
from retemper.engine.parallel import recompute
from retemper.kernels.attention import PER_DOCUMENT, flash, per_document

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow) if shutil.which("g++") else "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernel_attention(monkeypatch):
    """Blocks attend by one operator, as on a GPU."""
    monkeypatch.setattr(decoder_module, "attention", packed_model.compilable_attention)


def compiled(backend, mode="none", **changes):
    model = tiny_decoder(**changes)
    recompute.apply(model, ParallelConfig(recompute=mode))
    block_compile.apply(model, backend)
    return model


def assert_close(actual, expected, bound):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_same_losses_and_gradients(backend, mode, kernel_attention):
    """fp32 within 2e-6: the compiler fuses, so sums are rounded in another order."""
    counter = CompileCounterWithBackend(backend)
    model, plain = compiled(counter, mode), tiny_decoder()
    for batch in (packed(7, 40), packed(1, 2, 3, 50, 70, seed=3), packed(seed=4)):
        assert_close(gradients(model, batch), gradients(plain, batch), 2e-6)
    assert counter.frame_count
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize(("family", "mode"), [("qwen2_moe", "none"), ("glm4_moe", "selective"), ("qwen3_moe", "full")])
def test_mixtures_have_the_same_losses_and_gradients(backend, family, mode, kernel_attention):
    """The choice and order of experts and their grouped products are in the graph."""
    counter = CompileCounterWithBackend(backend)
    model, plain = compiled(counter, mode, **MIXTURES[family]), tiny_decoder(**MIXTURES[family])
    for batch in (packed(7, 40), packed(1, 2, 3, 50, 70, seed=3)):
        assert_close(gradients(model, batch), gradients(plain, batch), 3e-6)
    assert counter.frame_count <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("first", [(), (9,), range(1, 96)], ids=["one document", "two", "one token each"])
def test_all_blocks_and_packings_share_one_graph(mode, first, kernel_attention):
    """Whatever the number of documents and the longest one are; evaluation has its own, without gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    model = compiled(counter, mode, num_layers=5)
    gradients(model, packed(*first))
    assert counter.frame_count == 1
    for count in range(15):
        gradients(model, packed(*range(1, count)))
    assert counter.frame_count == 1
    for starts in (first, (50,), (20, 40, 60)):
        with torch.no_grad():
            model(packed(*starts))
    assert counter.frame_count == 2


def test_without_dynamic_integers_a_second_graph_takes_any_packing(monkeypatch, kernel_attention):
    """They are not part of PyTorch's stable interface."""
    monkeypatch.setattr(block_compile, "_DYNAMIC_INT", int)
    counter = CompileCounterWithBackend("aot_eager")
    model = compiled(counter)
    for starts in ((), (9,), (20, 40), range(1, 30)):
        gradients(model, packed(*starts))
    assert counter.frame_count == 2


def test_windows_and_evaluation_stay_within_the_limit(kernel_attention):
    """Kinds of blocks x training or evaluation: each has its graphs, and none falls back to eager."""
    counter = CompileCounterWithBackend("aot_eager")
    changes = {
        "num_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    }
    model, plain = compiled(counter, **changes), tiny_decoder(**changes)
    assert {layer.self_attn.window for layer in model.model.blocks} == {None, 8}
    for batch in (packed(9), packed(30, 50), packed(5, 6, 7)):
        assert_close(gradients(model, batch), gradients(plain, batch), 2e-6)
        with torch.no_grad():
            assert model(batch).item() == pytest.approx(plain(batch).item(), rel=2e-6)
    assert counter.frame_count == 2 * 2


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_packings_of_one_length_have_one_more_graph(monkeypatch, backend, mode):
    """Packings with cuDNN, which cannot run here, and others: two graphs in any order, and no break."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return packed_model.attention_operator(q, k, v, cu_q, max_q, None)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(flash, "_shares_heads", True)
    monkeypatch.setattr(per_document, "on_gpu", lambda x: True)
    monkeypatch.setattr(per_document, "_uses_cudnn", True)
    counter = CompileCounterWithBackend(backend)
    model, plain = compiled(counter, mode), tiny_decoder()

    def batch(*starts):
        return packed(*starts).prepare(CPU, "varlen", (None,), equal_lengths_backend="sdpa")

    wholes = (32, 64), (32, 64)
    for starts in ((7, 40), wholes[0], (1, 2, 3, 50, 70), wholes[1], range(1, 40), (11,)):
        assert_close(gradients(model, batch(*starts)), gradients(plain, packed(*starts)), 2e-6)
    assert counter.frame_count == 2
    # Another number of documents of one length is rare. It is variable from its second value on.
    for starts in ((16, 32, 48, 64, 80), (48,), (24, 48, 72), (8, 20), (32, 64)):
        assert_close(gradients(model, batch(*starts)), gradients(plain, packed(*starts)), 2e-6)
    assert counter.frame_count == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_attention_per_document_stays_outside_of_the_graphs():
    """As on a CPU: graphs before and after the attention, the same for every packing."""
    counter = CompileCounterWithBackend("aot_eager")
    model, plain = compiled(counter), tiny_decoder()

    def batch(*starts):
        return packed(*starts).prepare(CPU, PER_DOCUMENT, (None,))

    for starts in ((9,), (9, 50)):
        assert_close(gradients(model, batch(*starts)), gradients(plain, batch(*starts)), 2e-6)
    known = counter.frame_count
    assert known >= 2
    for count in range(2, 10):
        gradients(model, batch(*range(1, count)))
    assert counter.frame_count == known


@pytest.mark.parametrize(
    ("choice", "device", "backend", "mode", "expected"),
    [
        ("auto", CPU, PER_DOCUMENT, "none", False),
        ("auto", CPU, PER_DOCUMENT, "full", False),
        ("auto", CUDA, PER_DOCUMENT, "none", False),
        ("auto", CUDA, "varlen", "none", True),
        ("auto", CUDA, "varlen", "full", True),
        ("off", CUDA, "varlen", "none", False),
        ("on", CPU, PER_DOCUMENT, "none", True),
    ],
)
def test_who_compiles(choice, device, backend, mode, expected):
    assert block_compile.enabled(run_config(choice, mode), device, backend) is expected


def test_a_recomputed_block_that_cannot_be_compiled_is_refused():
    with pytest.raises(UserError, match=r"training.compile is on with parallel.recompute full.*set") as caught:
        block_compile.enabled(run_config("on", "full"), CPU, PER_DOCUMENT)
    assert "\n" not in str(caught.value)


def run_config(choice, mode):
    return RunConfig("folder", DataConfig(), TrainingConfig(1, compile=choice), parallel=ParallelConfig(recompute=mode))
