"""Which attention backend is taken, on machines that are only described: availability is faked."""

import re
from dataclasses import replace

import pytest
import torch

from retemper.engine.config.settings import DataConfig, ParallelConfig, RunConfig, SourceConfig, TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.model.attention_choice import choose_attention, choose_for_model, context_kind
from retemper.engine.model.implementations import parse_architecture
from retemper.kernels.attention import (
    UnusableBackend,
    choice,
    choose_attention_backend,
    flash,
    per_document,
    self_check,
)

PACKAGES = {
    "flash-attn": "flash_attn",
    "FA3": "flash_attn_interface",
    "FA4": "flash_attn.cute.interface",
    "triton": "triton",
}
HOPPER, AMPERE, BLACKWELL, TURING = (9, 0), (8, 0), (10, 0), (7, 5)


@pytest.fixture
def machine(monkeypatch):
    """``machine(capability, packages)``: a CUDA device with these; everything else is missing. Checks find nothing."""
    monkeypatch.setattr(flash, "_shares_heads", None)
    monkeypatch.setattr(per_document, "_uses_cudnn", None)

    def describe(
        capability,
        *packages,
        flash_attn=("softcap",),
        cudnn=None,
        shared_heads=None,
    ):
        monkeypatch.setattr(self_check, "cudnn_problem", lambda *kernels: cudnn)
        monkeypatch.setattr(self_check, "shared_heads_problem", lambda *kernels: shared_heads)
        installed = {PACKAGES[package] for package in packages}
        problem = "needs {}, which cannot be imported (No module named {!r})"
        monkeypatch.setattr(choice, "_capability", lambda device: capability if device.type == "cuda" else (0, 0))
        monkeypatch.setattr(
            choice, "import_problem", lambda name, _: None if name in installed else problem.format(name, name)
        )
        monkeypatch.setattr(choice, "_registered_implementations", lambda: ["FA3", "FA4"])
        monkeypatch.setattr(flash, "package_parameters", lambda: frozenset(flash_attn))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        choice.obstacle.cache_clear()
        return torch.device("cuda")

    yield describe
    choice.obstacle.cache_clear()


def choose(device, requested="auto", dtype=torch.bfloat16, head_dim=128, **options):
    return choose_attention_backend(requested, device, dtype, head_dim, **options)


@pytest.mark.parametrize(
    ("capability", "packages", "options", "expected"),
    [
        (HOPPER, ["flash-attn", "FA3", "FA4"], {}, "fa3"),
        (HOPPER, ["flash-attn", "FA4"], {}, "flash_attn"),
        (HOPPER, ["flash-attn"], {}, "flash_attn"),
        (HOPPER, [], {}, "varlen"),
        (HOPPER, ["flash-attn"], {"equal_lengths": True}, "sdpa"),
        (HOPPER, ["FA3"], {"equal_lengths": True}, "fa3"),
        (HOPPER, ["flash-attn"], {"equal_lengths": True, "windows": [None, 512]}, "flash_attn"),
        (HOPPER, [], {"windows": [None, 512]}, "varlen"),
        (HOPPER, ["flash-attn", "FA3"], {"dtype": torch.float32}, "per_document"),
        (HOPPER, ["flash-attn", "FA3"], {"dtype": torch.float32, "equal_lengths": True}, "per_document"),
        (HOPPER, ["flash-attn", "FA3"], {"head_dim": 12}, "per_document"),
        (HOPPER, ["FA3"], {"head_dim": 512}, "per_document"),
        (BLACKWELL, ["flash-attn", "FA3", "FA4"], {}, "fa4"),
        (BLACKWELL, ["flash-attn", "FA3", "FA4"], {"head_dim": 256}, "flash_attn"),
        (AMPERE, ["FA3", "FA4"], {}, "varlen"),
        (AMPERE, ["flash-attn"], {"equal_lengths": True}, "flash_attn"),
        (TURING, ["flash-attn", "FA3", "FA4", "triton"], {}, "per_document"),
        (HOPPER, ["flash-attn", "FA3", "FA4", "triton"], {"softcap": True}, "flash_attn"),
        (HOPPER, ["FA3", "triton"], {"softcap": True}, "flex"),
        (HOPPER, ["FA3"], {"softcap": True}, "per_document"),
        (HOPPER, ["FA3", "triton"], {"softcap": True, "dtype": torch.float32}, "flex"),
        (HOPPER, ["flash-attn", "FA3", "triton"], {"sinks": True}, "flex"),
        (HOPPER, ["flash-attn", "FA3", "triton"], {"sinks": True, "equal_lengths": True}, "flex"),
        (HOPPER, ["flash-attn", "FA3"], {"sinks": True}, "per_document"),
        (HOPPER, ["flash-attn", "triton"], {"sinks": True, "head_dim": 8}, "per_document"),
        (AMPERE, ["flash-attn", "triton"], {"head_dim": 192, "value_head_dim": 128}, "flash_attn"),
        (HOPPER, ["triton"], {"head_dim": 192, "value_head_dim": 128, "equal_lengths": True}, "varlen"),
        (BLACKWELL, ["FA4"], {"head_dim": 192, "value_head_dim": 128}, "varlen"),
        (HOPPER, ["FA3"], {"head_dim": 64, "value_head_dim": 512}, "per_document"),
        (HOPPER, [], {"in_blocks": True, "equal_lengths": True}, "varlen"),
        (HOPPER, ["triton"], {"in_blocks": True, "sinks": True}, "varlen"),
        (HOPPER, ["triton"], {"in_blocks": True, "softcap": True}, "per_document"),
    ],
)
def test_auto_takes_the_first_that_works(machine, capability, packages, options, expected):
    taken = choose(machine(capability, *packages), **options)
    assert taken.backend == expected
    assert "\n" not in taken.reason


def test_the_reason_says_what_was_missing(machine):
    assert choose(machine(AMPERE)).reason == (
        "PyTorch varlen_attn (FlashAttention-2); the fastest that works here (not usable: fa3, flash_attn)"
    )
    assert "varlen computes in bf16 or fp16, not float32" in choose(machine(HOPPER), dtype=torch.float32).reason
    assert choose(machine(HOPPER, "triton"), sinks=True).reason == (
        "FlexAttention; the fastest that works here (not usable: fa3, flash_attn, varlen)"
    )
    assert "per document; flex needs triton" in choose(machine(HOPPER), softcap=True).reason


@pytest.mark.parametrize(
    ("capability", "packages", "requested", "options", "expected"),
    [
        (HOPPER, [], "auto", {}, True),
        (BLACKWELL, [], "auto", {"dtype": torch.float16}, True),
        (HOPPER, ["flash-attn"], "auto", {}, True),
        (HOPPER, ["flash-attn"], "auto", {"head_dim": 64, "windows": [None, None]}, True),
        (AMPERE, ["flash-attn"], "auto", {}, False),
        (HOPPER, ["FA3"], "auto", {}, False),
        (BLACKWELL, ["FA4"], "auto", {}, False),
        (HOPPER, [], "varlen", {}, False),
        (HOPPER, ["flash-attn"], "flash_attn", {}, False),
        (HOPPER, [], "auto", {"windows": [None, 512]}, False),
        (HOPPER, ["flash-attn"], "auto", {"softcap": True}, False),
        (HOPPER, ["triton"], "auto", {"sinks": True}, False),
        (HOPPER, [], "auto", {"dtype": torch.float32}, False),
        (HOPPER, [], "auto", {"head_dim": 256}, False),
        (HOPPER, [], "auto", {"head_dim": 192, "value_head_dim": 128}, False),
    ],
)
def test_auto_takes_cudnn_for_documents_of_one_length(machine, capability, packages, requested, options, expected):
    taken = choose(machine(capability, *packages), requested, **options)
    assert taken.equal_lengths_backend == ("sdpa" if expected else None)
    assert taken.reason.endswith("; documents of one length: cuDNN through SDPA") is expected
    assert per_document._uses_cudnn is (True if expected else None)


@pytest.mark.parametrize("options", [{}, {"equal_lengths": True}])
def test_a_cudnn_that_fails_its_check_is_not_used(machine, options):
    taken = choose(machine(HOPPER, cudnn="wrong by nan in dQ"), **options)
    assert (taken.backend, taken.equal_lengths_backend) == ("varlen", None)
    assert taken.reason.endswith("; without cuDNN, because wrong by nan in dQ")
    assert per_document._uses_cudnn is False
    forced = choose(machine(HOPPER, cudnn="it raises"), "sdpa", equal_lengths=True)
    assert (forced.backend, forced.reason[-29:]) == ("sdpa", "without cuDNN, because it raises"[-29:])


@pytest.mark.parametrize(("backend", "packages"), [("varlen", []), ("fa3", ["FA3"])])
def test_heads_are_shared_where_the_check_finds_nothing(machine, backend, packages):
    assert choose(machine(HOPPER, *packages)).backend == backend
    assert flash._shares_heads is True
    taken = choose(machine(HOPPER, *packages, shared_heads="it raises an error"))
    assert taken.backend == backend
    assert "; keys and values are copied for all heads, because without copies it raises an error" in taken.reason
    assert flash._shares_heads is False


@pytest.mark.parametrize("options", [{}, {"equal_lengths": True}, {"dtype": torch.float32}, {"windows": [4]}])
def test_a_cpu_goes_document_by_document(options):
    taken = choose(torch.device("cpu"), **options)
    assert taken == ("per_document", "PyTorch SDPA per document; the backend for CPUs", None)


@pytest.mark.parametrize(
    ("capability", "packages", "requested", "options", "message"),
    [
        (HOPPER, [], "fa3", {}, "needs flash_attn_interface, which cannot be imported"),
        (HOPPER, [], "flash_attn", {}, "needs flash_attn, which cannot be imported"),
        (AMPERE, ["FA3"], "fa3", {}, "needs compute capability 9.x, and the GPU has 8.0"),
        (AMPERE, ["FA4"], "fa4", {}, "needs compute capability 9.x or 10.x, and the GPU has 8.0"),
        (TURING, [], "varlen", {}, "needs compute capability 8.0 or newer, and the GPU has 7.5"),
        (HOPPER, ["FA4"], "fa4", {"head_dim": 256}, "a multiple of 8 and at most 128, not 256"),
        (HOPPER, [], "varlen", {"dtype": torch.float32}, "computes in bf16 or fp16, not float32"),
        (HOPPER, [], "sdpa", {}, "is for documents of one length (data.attend_across_documents: true)"),
        (HOPPER, ["triton"], "flex", {"head_dim": 8}, "needs a head size of at least 16, not 8"),
        (HOPPER, [], "flex", {}, "needs triton"),
        (HOPPER, ["triton"], "flex", {"value_head_dim": 8}, "needs a head size of at least 16, not 8"),
        (HOPPER, [], "varlen", {"value_head_dim": 264}, "a multiple of 8 and at most 256, not 264"),
        (HOPPER, ["FA3"], "fa3", {"softcap": True}, "cannot cap scores, which this model does"),
        (HOPPER, [], "varlen", {"softcap": True}, "cannot cap scores, which this model does"),
        (HOPPER, ["flash-attn"], "flash_attn", {"sinks": True}, "has no attention sinks, which this model uses"),
        (HOPPER, [], "flash", {}, "unknown attention backend 'flash'; use auto, fa4, fa3, sdpa"),
    ],
)
def test_a_forced_backend_that_cannot_work_is_refused(machine, capability, packages, requested, options, message):
    device = machine(capability, *packages)
    with pytest.raises(UnusableBackend, match=re.escape(message)) as refusal:
        choose(device, requested, **options)
    assert "use auto" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_flash_attn_that_is_too_old_to_cap_scores(machine):
    device = machine(HOPPER, "flash-attn", "triton", flash_attn=("window_size",))
    assert choose(device).backend == "flash_attn"
    assert choose(device, softcap=True).backend == "flex"
    with pytest.raises(UnusableBackend, match=r"flash_attn needs flash-attn 2.6 or newer .*; use auto or flex"):
        choose(device, "flash_attn", softcap=True)


@pytest.mark.parametrize("requested", ["flash_attn", "fa3", "fa4", "varlen", "flex", "sdpa", "per_document"])
def test_a_forced_backend_that_works_is_taken(machine, requested):
    device = machine(HOPPER, *PACKAGES)
    assert choose(device, requested, equal_lengths=True).backend == requested


@pytest.mark.parametrize("requested", ["flash_attn", "fa3", "fa4", "varlen", "flex"])
def test_a_cpu_refuses_the_kernels_of_gpus(requested):
    with pytest.raises(UnusableBackend, match=f"{requested} needs a GPU.* use auto or sdpa or per_document"):
        choose(torch.device("cpu"), requested, equal_lengths=True)


ARCHITECTURE = parse_architecture(
    {
        "model_type": "mistral",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "sliding_window": 512,
        "head_dim": 64,
    }
)


def run_config(across: bool, sequence_length: int, backend: str = "auto") -> RunConfig:
    return RunConfig(
        run_folder="run",
        data=DataConfig(train=[SourceConfig("x")], attend_across_documents=across),
        training=TrainingConfig(
            train_tokens=10_000, sequence_length=sequence_length, attention_backend=backend, precision="bf16"
        ),
    )


@pytest.mark.parametrize(
    ("across", "sequence_length", "expected"),
    [(False, 256, "varlen"), (True, 256, "sdpa"), (True, 512, "sdpa"), (True, 1024, "varlen")],
)
def test_a_run_is_a_batch_where_documents_are_windows_and_no_sliding_window_is_shorter(
    machine, across, sequence_length, expected
):
    assert ARCHITECTURE.sliding_windows == (512, 512)
    device = machine(HOPPER)
    assert choose_attention(run_config(across, sequence_length), ARCHITECTURE, device).backend == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"attention_softcap": 50.0}, "flash_attn"),
        ({"attention_sinks": True}, "flex"),
        ({"value_head_dim": 512}, "per_document"),
    ],
)
def test_the_model_says_what_its_attention_needs(machine, facts, expected):
    device = machine(HOPPER, "flash-attn", "triton")
    architecture = replace(ARCHITECTURE, **facts)
    assert choose_attention(run_config(False, 256), architecture, device).backend == expected
    assert choose_for_model("auto", architecture, device, torch.bfloat16).backend == expected


def test_a_run_names_the_key_when_it_refuses(machine):
    with pytest.raises(UserError, match=r"^training.attention_backend: attention by fa3 needs .*; use auto or varlen"):
        choose_attention(run_config(False, 256, "fa3"), ARCHITECTURE, machine(HOPPER))


def test_fp32_runs_do_without_flash_attention(machine):
    config = run_config(False, 256)
    config = replace(config, training=replace(config.training, precision="fp32"))
    assert choose_attention(config, ARCHITECTURE, machine(HOPPER, "flash-attn")).backend == "per_document"


@pytest.mark.parametrize(
    ("context", "kind", "expected", "end"),
    [
        (1, "auto", "heads", "the backend for CPUs"),
        (1, "ring", "heads", "the backend for CPUs"),
        (2, "auto", "heads", "; 2 ranks exchange heads for tokens (the numbers of heads allow it)"),
        (2, "ring", "ring", "; ring attention over 2 ranks (as configured)"),
        (3, "auto", "ring", "over 3 ranks (parallel.context 3 does not divide the 4 attention heads of a rank (4))"),
        (8, "auto", "ring", "over 8 ranks (parallel.context 8 does not divide the 4 attention heads of a rank (4))"),
    ],
)
def test_context_parallel_ranks_exchange_heads_where_they_can(context, kind, expected, end):
    assert (ARCHITECTURE.num_attention_heads, ARCHITECTURE.num_key_value_heads) == (4, 2)
    config = replace(run_config(False, 256), parallel=ParallelConfig(context=context, context_kind=kind))
    assert context_kind(config.parallel, ARCHITECTURE) == expected
    assert choose_attention(config, ARCHITECTURE, torch.device("cpu")).reason.endswith(end)


def test_ring_attention_refuses_backends_that_cannot_compute_it():
    config = replace(run_config(True, 256, "sdpa"), parallel=ParallelConfig(context=3))
    with pytest.raises(
        UserError, match=r"attention by sdpa cannot attend to parts of documents.*; use auto or per_doc"
    ):
        choose_attention(config, ARCHITECTURE, torch.device("cpu"))
