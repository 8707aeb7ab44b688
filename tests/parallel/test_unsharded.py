"""One data-parallel rank without FSDP: bit for bit what FSDP computes there."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path

import packed_model
import parity_run
import pytest
import tiny_run
import torch
from parity_run import Model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import FSDPModule

from retemper.benchmarks.host_cost import OperatorCounter
from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.model import decoder as decoder_module
from retemper.engine.parallel import build, data_parallel, host_transfers
from retemper.engine.parallel import compile as block_compile

DTYPES = {
    "fp32": "--training.precision fp32",
    "bf16": "--training.precision bf16",
    "bf16 weights": "--training.precision bf16 --training.weight_dtype bf16",
    "bf16 weights in fp32": "--training.precision fp32 --training.weight_dtype bf16",
}
BATCHES = {"one micro-batch": "8", "several": "2"}
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}
MODELS = [Model("qwen3", tied=True, packed=True), Model("llama", tied=False, packed=True)]


@pytest.fixture(scope="module")
def run_files(tmp_path_factory) -> dict[Model, Path]:
    """Tiny runs of a model with a tied head and of one without."""
    return {model: parity_run.write_run(tmp_path_factory.mktemp("unsharded"), model) for model in MODELS}


@pytest.fixture
def use_fsdp(monkeypatch):
    """Wraps models in FSDP from now on, as on several ranks."""
    return lambda: monkeypatch.setattr(data_parallel, "is_alone", lambda mesh, config: False)


def steps(ranks, path: Path, options: str) -> list[Tensor]:
    """Losses, gradients before clipping, weights and an evaluation of three steps."""
    run = pretrain.build(parse_config(["--config", str(path), *options.split()]), ranks)
    seen: list[Tensor] = []
    accumulate = run.forward_backward.accumulate_gradients

    def recorded(*arguments):
        loss = accumulate(*arguments)
        seen.extend(tiny_run.whole(parameter.grad) for parameter in run.model.parameters())
        return loss

    run.forward_backward.accumulate_gradients = recorded
    for step in range(3):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        result = pretrain.one_step(run, batches, float(sum(batch.num_targets for batch in batches)))
        seen += [result.loss, result.grad_norm]
        seen.append(run.forward_backward.evaluate(batches))
    seen.extend(tiny_run.whole(parameter) for parameter in run.model.parameters())
    assert isinstance(run.model.decoders[0], FSDPModule) == (
        not data_parallel.is_alone(run.mesh.fsdp, run.config.parallel)
    )
    return seen


@pytest.mark.parametrize(
    ("dtypes", "batches", "model", "recompute"),
    [
        *((*case, "none") for case in itertools.product(DTYPES, BATCHES, MODELS)),
        ("bf16", "several", MODELS[1], "full"),
        ("bf16", "several", MODELS[1], "selective"),
    ],
    ids=str,
)
def test_every_bit_is_that_of_fsdp(dtypes, batches, model, recompute, one_rank, run_files, use_fsdp):
    options = f"{DTYPES[dtypes]} --training.micro_batch_size {BATCHES[batches]} --parallel.recompute {recompute}"
    actual = steps(one_rank, run_files[model], options)
    use_fsdp()
    expected = steps(one_rank, run_files[model], options)
    assert len(actual) == len(expected) > 60
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtypes", "micro_batches", "expected", "of_fsdp"),
    [
        ("bf16", 1, 12, 34),  # fp32 weight to bf16, bf16 gradient to fp32
        ("bf16 weights", 1, 0, 28),
        ("bf16 weights", 2, 6, 62),  # the first gradient to fp32
        ("fp32", 1, 0, 32),
    ],
)
def test_bytes_that_are_copied_for_each_parameter(
    dtypes, micro_batches, expected, of_fsdp, one_rank, tmp_path, use_fsdp
):
    """Of a model so wide that its activations hardly count."""
    path = parity_run.write_run(tmp_path, MODELS[1])
    wide = {**parity_run.FAMILIES["llama"], "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    options = f"{DTYPES[dtypes]} --training.global_batch_size {micro_batches} --training.micro_batch_size 1"
    options += f" --training.sequence_length 8 --model.architecture {json.dumps(wide).replace(' ', '')}"

    def copied() -> float:
        run = pretrain.build(parse_config(["--config", str(path), *options.split()]), one_rank)
        batches = run.data.micro_batches(0)
        run.forward_backward.accumulate_gradients(batches, 10.0, lambda phase: None)
        run.optimizer.zero_grad()
        with OperatorCounter() as counter:
            run.forward_backward.accumulate_gradients(batches, 10.0, lambda phase: None)
        return counter.copied_bytes / sum(parameter.numel() for parameter in run.model.parameters())

    assert copied() == pytest.approx(expected, abs=0.5)
    use_fsdp()
    assert copied() == pytest.approx(of_fsdp, abs=0.5)


OFFLOAD = " --parallel.cpu_offload optimizer"


@pytest.mark.parametrize(
    ("dtypes", "batches", "model"),
    [
        ("fp32", "one micro-batch", MODELS[0]),
        ("bf16", "several", MODELS[0]),
        ("bf16 weights", "several", MODELS[1]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(DTYPES, BATCHES, MODELS)),
    ],
    ids=str,
)
def test_an_optimizer_on_the_host_computes_the_same_bits(dtypes, batches, model, one_rank, run_files, monkeypatch):
    """Also if gradients are added while others are on their way."""
    options = f"{DTYPES[dtypes]} --training.micro_batch_size {BATCHES[batches]}"
    expected = steps(one_rank, run_files[model], options)
    monkeypatch.setattr(host_transfers, "_WAITING_BYTES", 5000)
    actual = steps(one_rank, run_files[model], options + OFFLOAD)
    assert len(actual) == len(expected) > 60
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_stages_of_a_pipeline_with_optimizers_on_the_host(two_ranks, run_files):
    options = f"{DTYPES['bf16']} --training.micro_batch_size 2 --parallel.pipeline 2"
    expected = two_ranks.run(steps, run_files[MODELS[0]], options)
    for ours, theirs in zip(two_ranks.run(steps, run_files[MODELS[0]], options + OFFLOAD), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("axis", ["shard", "tensor", "context", "replicate"])
def test_ranks_that_share_parameters_do_not_offload_the_optimizer_alone(axis, two_ranks, run_files):
    options = [*OFFLOAD.split(), f"--parallel.{axis}", "2"]
    for said in two_ranks.run(parity_refusal, run_files[MODELS[0]], options):
        assert "parallel.cpu_offload is optimizer" in said and "2 ranks share them; set it to true" in said


def parity_refusal(ranks, path: Path, options: list[str]) -> str:
    """What a run says that is refused."""
    with pytest.raises(UserError) as error:
        pretrain.build(parse_config(["--config", str(path), *options]), ranks)
    return str(error.value)


def test_a_run_with_its_optimizer_on_the_host_resumes_bit_for_bit(one_rank, run_file, tmp_path):
    options = [*DTYPES["bf16"].split(), *OFFLOAD.split(), "--training.train_tokens", str(8 * 8 * 32), "--run_folder"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tiny_run.train(one_rank, run_file, [*options, str(whole)])
    tiny_run.copy_of(whole, broken)
    shutil.rmtree(broken / "checkpoints/step-00000008")
    tiny_run.train(one_rank, run_file, [*options, str(broken)])
    assert tiny_run.curve(broken) == tiny_run.curve(whole)
    expected, actual = (tiny_run.tensors_of(folder / "checkpoints/step-00000008") for folder in (whole, broken))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def both(ranks, path: Path, options: str) -> tuple[list[Tensor], list[Tensor]]:
    """What this rank computes without FSDP and with it."""
    alone = steps(ranks, path, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "is_alone", lambda mesh, config: False)
        return alone, steps(ranks, path, options)


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_stages_of_a_pipeline_compute_the_bits_of_fsdp(dtypes, model, two_ranks, run_files):
    options = f"{DTYPES[dtypes]} --training.micro_batch_size 2 --parallel.pipeline 2"
    for actual, expected in two_ranks.run(both, run_files[model], options):
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("schedule", ["zbv_zero_bubble", "interleaved_zero_bubble"])
def test_gradients_without_hooks_are_collected(schedule, one_rank, two_ranks, run_files):
    """After each micro-batch, so that they are added in fp32 as on one rank."""
    options = f"{DTYPES['bf16']} --training.micro_batch_size 2"
    expected = trained(one_rank, run_files[MODELS[1]], options)[1]
    options += f" --parallel.pipeline 2 --parallel.pipeline_schedule {schedule} --parallel.pipeline_stages_per_rank 2"
    options += " --parallel.reshard_after_forward false"
    parts = two_ranks.run(trained, run_files[MODELS[1]], options)
    actual = {name: gradient for _, gradients in parts for name, gradient in gradients.items()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize(
    ("dtypes", "batches"),
    [
        ("fp32", "one micro-batch"),
        ("bf16", "several"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(DTYPES, BATCHES)),
    ],
)
def test_tensor_parallel_ranks_sum_the_gradients_of_norms(dtypes, batches, two_ranks, run_files):
    """FSDP sums them after every micro-batch, in the compute dtype."""
    options = f"{DTYPES[dtypes]} --training.micro_batch_size {BATCHES[batches]} --parallel.tensor 2"
    options += " --optimizer.learning_rate 0 --optimizer.min_learning_rate 0"
    bound = 1e-6 if dtypes == "fp32" else 1e-2
    for actual, expected in two_ranks.run(both, run_files[MODELS[0]], options):
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == other.dtype and (one - other).norm() <= bound * other.norm()
            if dtypes == "fp32" and batches == "one micro-batch":
                assert torch.equal(one, other)


def evaluated(ranks, path: Path, options: str) -> list[float]:
    """Losses of two evaluations, with a step in between."""
    run = pretrain.build(parse_config(["--config", str(path), *options.split()]), ranks)
    batches = run.data.micro_batches(0)
    losses = [run.forward_backward.evaluate(batches).sum().item()]
    pretrain.one_step(run, batches, 50.0)
    return [ranks.all_reduce(loss) for loss in (*losses, run.forward_backward.evaluate(batches).sum().item())]


@pytest.mark.parametrize("schedule", ["zbv_zero_bubble", "interleaved_zero_bubble"])
def test_zero_bubble_schedules_evaluate(schedule, one_rank, two_ranks, run_files):
    options = f"{DTYPES['fp32']} --training.micro_batch_size 2"
    expected = evaluated(one_rank, run_files[MODELS[1]], options)
    options += f" --parallel.pipeline 2 --parallel.pipeline_schedule {schedule} --parallel.pipeline_stages_per_rank 2"
    options += " --parallel.reshard_after_forward false"
    for losses in two_ranks.run(evaluated, run_files[MODELS[1]], options):
        assert losses == pytest.approx(expected, rel=1e-6) and losses[1] < losses[0]


def test_names_show_copies_only_during_passes(one_rank, run_files):
    options = ["--config", str(run_files[MODELS[0]]), *DTYPES["bf16"].split()]
    run = pretrain.build(parse_config(options), one_rank)
    [decoder] = run.model.decoders
    weights, seen = dict(run.model.named_parameters()), []
    decoder.register_forward_hook(lambda *_: seen.append(dict(decoder.named_parameters())))
    batches = run.data.micro_batches(0)
    run.forward_backward.evaluate(batches[:1])
    run.forward_backward.accumulate_gradients(batches[:1], 10.0, lambda phase: None)
    assert [parameter.dtype for shown in seen for parameter in shown.values()] == [torch.bfloat16] * 2 * len(weights)
    assert all(seen[0][name] is seen[1][name] and seen[0][name].grad is None for name in weights)
    assert all(
        parameter is weights[name] and parameter.grad.dtype == torch.float32
        for name, parameter in decoder.named_parameters()
    )

    def fail(*_):
        raise InterruptedError

    decoder.register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        run.forward_backward.evaluate(batches[:1])
    assert all(parameter is weights[name] for name, parameter in decoder.named_parameters())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_are_compiled_once(recompute, one_rank, run_files, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(block_compile, "enabled", lambda *_: True)
    monkeypatch.setattr(build.block_compile, "apply", functools.partial(block_compile.apply, backend=counter))
    monkeypatch.setattr(decoder_module, "attention", packed_model.compilable_attention)
    options = ["--config", str(run_files[MODELS[0]]), *DTYPES["bf16"].split(), "--parallel.recompute", recompute]
    run = pretrain.build(parse_config(options), one_rank)
    counts = []
    for step in range(4):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        pretrain.one_step(run, batches, float(sum(batch.num_targets for batch in batches)))
        run.forward_backward.evaluate(batches)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[-1]


def test_frozen_weights_have_copies_without_gradients(one_rank, run_files, use_fsdp):
    options = f"{DTYPES['bf16']} --training.trainable embeddings --training.micro_batch_size 2"
    actual = trained(one_rank, run_files[MODELS[1]], options)
    use_fsdp()
    expected = trained(one_rank, run_files[MODELS[1]], options)
    assert {name for name, gradient in actual[1].items() if gradient is not None} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    for name, weight in expected[0].items():
        assert torch.equal(actual[0][name], weight), name
    for name, gradient in expected[1].items():
        assert gradient is None or torch.equal(actual[1][name], gradient), name


def trained(ranks, path: Path, options: str) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Weights after a step, and the gradients of the first; None for frozen parameters."""
    run = pretrain.build(parse_config(["--config", str(path), *options.split()]), ranks)
    batches, named = run.data.micro_batches(0), dict(run.model.named_parameters())
    run.forward_backward.accumulate_gradients(batches, 50.0, lambda phase: None)
    gradients = {name: None if p.grad is None else tiny_run.whole(p.grad) for name, p in named.items()}
    run.optimizer.zero_grad()
    pretrain.one_step(run, batches, 50.0)
    return {name: tiny_run.whole(parameter) for name, parameter in named.items()}, gradients
