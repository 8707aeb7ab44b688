"""Activations in host memory: the same bits in every layout, and what leaves the device."""

from __future__ import annotations

import functools

import packed_model
import parity_run
import pytest
import torch
from parity_run import Model
from torch._dynamo.testing import CompileCounterWithBackend

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.model import decoder as decoder_module
from retemper.engine.parallel import activation_offload, build
from retemper.engine.parallel import compile as block_compile
from retemper.engine.parallel.activation_offload import ActivationOffload
from retemper.tools.planning.memory import MemoryCounter

OFFLOAD = ["--parallel.offload_activations", "true"]
MODEL = Model("qwen3", tied=True, packed=True)
LAYERS, TOKENS, HIDDEN = 4, 32, 32


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return parity_run.write_run(tmp_path_factory.mktemp("offload"), MODEL)


def five_steps(ranks, path, overrides) -> tuple[parity_run.Outcome, int]:
    """The steps, and the bytes that were sent to the host; memory of any size is sent."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_offload, "MIN_BYTES", 0)
        begin = ActivationOffload.begin

        def noted(offload):
            found.append(offload)
            begin(offload)

        patch.setattr(ActivationOffload, "begin", noted)
        outcome = parity_run.five_steps(ranks, path, overrides)
    return outcome, sum(offload.sent_bytes for offload in set(found))


def same(one: parity_run.Outcome, other: parity_run.Outcome) -> None:
    assert one.losses == other.losses and one.grad_norms == other.grad_norms
    for ours, theirs in ((one.gradients, other.gradients), (one.parameters, other.parameters)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "--parallel.recompute full",
        "--training.precision bf16 --training.micro_batch_size 4",
        "--training.precision fp16 --parallel.cpu_offload optimizer",
        "--model.implementation transformers",
        pytest.param("--parallel.recompute full --parallel.recompute_every 2", marks=pytest.mark.slow),
        pytest.param("--training.fuse_projections true", marks=pytest.mark.slow),
        pytest.param("--parallel.cpu_offload true", marks=pytest.mark.slow),
    ],
)
def test_every_bit_is_the_same(settings, one_rank, run_file):
    (expected, nothing), (actual, sent) = (
        five_steps(one_rank, run_file, [*settings.split(), *more]) for more in ([], OFFLOAD)
    )
    same(actual, expected)
    assert nothing == 0 < sent
    if settings == "--parallel.recompute full":
        # The inputs of all blocks but the last.
        assert sent == parity_run.STEPS * parity_run.GLOBAL_BATCH * (LAYERS - 1) * TOKENS * HIDDEN * 4


@pytest.mark.parametrize(
    "layout",
    [
        "shard 2",
        "tensor 2",
        "pipeline 2",
        pytest.param("context 2", marks=pytest.mark.slow),
        pytest.param("shard 2 --parallel.recompute full", marks=pytest.mark.slow),
        pytest.param("tensor 2 --parallel.recompute full", marks=pytest.mark.slow),
        pytest.param(
            "pipeline 2 --parallel.pipeline_schedule interleaved_1f1b --parallel.pipeline_stages_per_rank 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layouts(layout, two_ranks, run_file):
    settings = f"--parallel.{layout}".split()
    expected, actual = (two_ranks.run(five_steps, run_file, [*settings, *more]) for more in ([], OFFLOAD))
    for (ours, sent), (theirs, nothing) in zip(actual, expected, strict=True):
        same(ours, theirs)
        # An interleaved rank has stages of one block, which is the last of its stage.
        assert nothing == 0 and (sent > 0 or "interleaved" in layout)


def test_the_device_frees_what_has_left(one_rank, run_file, monkeypatch):
    """Between forward and backward, one block of four is left, and while copies are on their way, two more."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 0)

    def kept(overrides, on_their_way=0):
        monkeypatch.setattr(activation_offload, "_BLOCKS_ON_THEIR_WAY", on_their_way)
        run = pretrain.build(parse_config(["--config", str(run_file), *overrides]), one_rank)
        [batch] = run.data.micro_batches(0)[:1]
        counter = MemoryCounter(block_bytes=1)
        counter.declare("parameters", run.model.parameters())
        to_host = ActivationOffload._to_host

        def unseen(offload, whole):
            with counter.paused():
                return to_host(offload, whole)

        with monkeypatch.context() as patch, counter:
            patch.setattr(ActivationOffload, "_to_host", unseen)
            loss = run.forward_backward.loss_sum(batch)
            held = counter.bytes["activations"]
            loss.backward()
            del loss
        return held, counter.peak["activations"]

    (before, peak_before), (after, peak_after), (leaving, _) = kept([]), kept(OFFLOAD), kept(OFFLOAD, 2)
    assert after < 0.45 * before and after < leaving < before
    assert peak_after < 0.8 * peak_before


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks(recompute, one_rank, run_file, monkeypatch):
    monkeypatch.setattr(block_compile, "enabled", lambda *_: True)
    monkeypatch.setattr(decoder_module, "attention", packed_model.compilable_attention)
    outcomes, counts = [], []
    for more in ([], OFFLOAD):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(build.block_compile, "apply", functools.partial(block_compile.apply, backend=counter))
        outcomes.append(five_steps(one_rank, run_file, ["--parallel.recompute", recompute, *more]))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    (expected, _), (actual, sent) = outcomes
    same(actual, expected)
    assert sent > 0 and counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--parallel.recompute selective", "parallel.recompute is selective"),
        (
            "--parallel.pipeline 2 --parallel.pipeline_schedule interleaved_zero_bubble "
            "--parallel.pipeline_stages_per_rank 2 --parallel.reshard_after_forward false",
            "interleaved_zero_bubble needs activations twice",
        ),
    ],
)
def test_refused(options, expected, run_file):
    config = parse_config(["--config", str(run_file), *OFFLOAD, *options.split()])
    with pytest.raises(UserError, match=expected) as error:
        activation_offload.check(config)
    assert "\n" not in str(error.value)
