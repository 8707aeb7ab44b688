"""``training.ema_decay``: as torch.optim.swa_utils and float64 compute it, in any layout, resumed and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import assert_refused
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from retemper.checkpoint_convert import dcp_to_hf as export_command
from retemper.engine import pretrain
from retemper.engine.config.settings import OptimizerConfig, TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.guards.rollback import Rollback, roll_back
from retemper.engine.observe.start_summary import describe_start
from retemper.engine.optim import average_of, build_average, build_optimizer, keep_average, step_unless
from retemper.engine.optim.average import WeightAverage
from retemper.engine.schedule import Progress
from retemper.engine.weights.checkpoint.destination import checkpoint_bytes
from retemper.engine.weights.checkpoint.manifest import read_manifest

DECAY, STEPS = 0.9, 6
LENGTH = [
    "--training.train_tokens",
    str(STEPS * 8 * 32),
    "--optimizer.schedule",
    "constant",
    "--checkpoint.keep_last",
    "9",
]
EMA = [*LENGTH, "--training.ema_decay", str(DECAY), "--checkpoint.save_interval", "1"]
GO, SKIP = torch.zeros(()), torch.ones(())


def last(run_folder: Path, step: int = STEPS) -> Path:
    return run_folder / "checkpoints" / f"step-{step:08d}"


def averages_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = tiny_run.tensors_of(checkpoint)
    return {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}


def build_and_keep(model: nn.Module, **settings) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    optimizer = build_optimizer(named, OptimizerConfig(learning_rate=0.1))
    keep_average(optimizer, build_average(named, TrainingConfig(train_tokens=1, ema_decay=DECAY, **settings), 7))
    average_of(optimizer).reset()
    return optimizer


def grow(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


def test_fp32_equals_torch_and_ignores_skipped_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 3))
    optimizer = build_and_keep(model)
    expected = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
    expected.n_averaged += 1  # the average begins as the weights before the first step, not after it
    mine = average_of(optimizer).tensors()
    for step in range(1, 9):
        grow(model, step)
        before = {name: tensor.clone() for name, tensor in mine.items()}
        step_unless(optimizer, SKIP if step == 5 else GO, None, step)
        if step == 5:
            assert all(torch.equal(mine[name], before[name]) for name in mine)
        else:
            expected.update_parameters(model)
            assert not any(torch.equal(mine[name], before[name]) for name in mine)
    for name, parameter in expected.module.named_parameters():
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_rounds_to_a_neighbour_without_bias(weights):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(400, 500).to(weights))
    average = WeightAverage([("weight", parameter)], 0.999, torch.bfloat16, seed=3)
    average.reset()
    mine = average.tensors()["weight"]
    before = mine.clone()
    with torch.no_grad():
        parameter.add_(torch.randn(400, 500).to(weights), alpha=0.1)
    average.update(GO, step=1)
    exact = before.double() + (parameter.detach().double() - before.double()) * 0.001
    error = mine.double() - exact
    spacing = torch.exp2(exact.abs().log2().floor() - 7)
    assert (error.abs() < spacing * 1.001).all() and (mine != before).double().mean() > 0.001
    assert abs((error / spacing).mean().item()) < 5.5 * 0.5 / (400 * 500) ** 0.5
    kept = mine.clone()
    average.update(SKIP, step=2)
    assert torch.equal(mine, kept)


def test_the_rounding_is_that_of_the_step():
    parameter = nn.Parameter(torch.randn(64, 64))
    runs = []
    for step in (1, 1, 2):
        average = WeightAverage([("weight", parameter)], 0.99, torch.bfloat16, seed=3)
        average.update(GO, step)
        runs.append(average.tensors()["weight"])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_frozen_parameters_have_no_average():
    frozen, trained = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    average = WeightAverage([("frozen", frozen), ("trained", trained)], DECAY, torch.float32, 0)
    assert set(average.tensors()) == {"trained"}


def test_the_weights_come_back_as_they_were(monkeypatch):
    parameter = nn.Parameter(torch.randn(5, 5))
    average = WeightAverage([("weight", parameter)], DECAY, torch.bfloat16, 0)
    weight = parameter.detach().clone()
    with pytest.raises(ZeroDivisionError), average.applied():
        assert torch.equal(parameter, average.tensors()["weight"].float()) and torch.is_grad_enabled()
        raise ZeroDivisionError
    assert torch.equal(parameter, weight)


# ---------------------------------------------------------------------------------------------------------------------
# In a run


@pytest.fixture(scope="module")
def even_file(run_file, tmp_path_factory) -> Path:
    """The tiny run with a vocabulary that two ranks can share."""
    config = yaml.safe_load(run_file.read_text())
    config["model"]["architecture"] |= {"vocab_size": tiny_run.VOCAB_SIZE + 1}
    path = tmp_path_factory.mktemp("even") / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(one_rank, even_file, tmp_path_factory) -> dict[str, Path]:
    """Run folders of undisturbed runs with a checkpoint of every step, by dtype of the average."""
    root = tmp_path_factory.mktemp("averaged")
    for dtype in ("fp32", "bf16"):
        tiny_run.train(one_rank, even_file, [*EMA, "--training.ema_dtype", dtype, "--run_folder", str(root / dtype)])
    return {dtype: root / dtype for dtype in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def first_weights(one_rank, even_file, tmp_path_factory) -> dict[str, torch.Tensor]:
    run = pretrain.build(tiny_run.configure(even_file, "--run_folder", str(tmp_path_factory.mktemp("first"))), one_rank)
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def assert_average_of_the_weights(run_folder: Path, begin: dict[str, torch.Tensor], first: int, seed: int = 1234):
    """The averages in the checkpoints after step ``first`` are those of the whole weights there, bit for bit."""
    weights = {name: nn.Parameter(tensor.float().clone()) for name, tensor in begin.items()}
    dtype = next(iter(averages_of(last(run_folder)).values())).dtype
    expected = WeightAverage(list(weights.items()), DECAY, dtype, seed)
    expected.reset()
    for step in range(first + 1, STEPS + 1):
        there = tiny_run.tensors_of(last(run_folder, step))
        for name, weight in weights.items():
            weight.data.copy_(there[name])
        expected.update(GO, step)
        for name, mean in expected.tensors().items():
            assert torch.equal(there[f"ema.{name}"], mean), (step, name)
    assert averages_of(last(run_folder)).keys() == weights.keys()


def test_a_checkpoint_holds_the_average_in_float64(runs, first_weights):
    expected = {name: tensor.double() for name, tensor in first_weights.items()}
    for step in range(1, STEPS + 1):
        weights = tiny_run.tensors_of(last(runs["fp32"], step))
        expected = {name: DECAY * mean + (1 - DECAY) * weights[name].double() for name, mean in expected.items()}
    for name, mean in averages_of(last(runs["fp32"])).items():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_training_is_the_same_with_and_without(one_rank, even_file, runs, tmp_path):
    tiny_run.train(one_rank, even_file, [*LENGTH, "--run_folder", str(tmp_path)])
    assert tiny_run.curve(tmp_path) == tiny_run.curve(runs["fp32"]) == tiny_run.curve(runs["bf16"])


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ([], "bf16"),
        (["--parallel.tensor", "2"], "bf16"),
        (["--parallel.pipeline", "2"], "fp32"),
        pytest.param(["--parallel.replicate", "2"], "fp32", marks=pytest.mark.slow),
        pytest.param(["--parallel.context", "2", "--parallel.cpu_offload", "true"], "bf16", marks=pytest.mark.slow),
        pytest.param(["--training.trainable", "embeddings"], "fp32", marks=pytest.mark.slow),
    ],
    ids=["shard", "tensor", "pipeline", "replicate", "context and offload", "embeddings"],
)
def test_two_ranks_keep_the_average_of_their_weights(two_ranks, even_file, first_weights, tmp_path, layout, dtype):
    options = [*EMA, "--training.ema_dtype", dtype, *layout, "--training.check_replicas_interval", "2"]
    two_ranks.run(tiny_run.train, even_file, [*options, "--run_folder", str(tmp_path)])
    trained = {n: t for n, t in first_weights.items() if "embeddings" not in layout or "embed_tokens" in n}
    assert_average_of_the_weights(tmp_path, trained, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_same(one_rank, even_file, runs, tmp_path, dtype):
    options = [*EMA, "--training.ema_dtype", dtype, "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, even_file, options, 3)
    tiny_run.train(one_rank, even_file, options)
    mine, theirs = (tiny_run.tensors_of(last(folder)) for folder in (tmp_path, runs[dtype]))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "layout",
    [[], pytest.param(["--parallel.pipeline", "2"], marks=pytest.mark.slow)],
    ids=["shard", "pipeline"],
)
def test_another_layout_continues_from_the_same_bits(two_ranks, even_file, runs, tmp_path, layout):
    folder = tiny_run.copy_of(runs["bf16"], tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(last(folder, step))
    options = [*EMA, "--training.ema_dtype", "bf16", *layout, "--run_folder", str(folder)]
    two_ranks.run(tiny_run.train, even_file, options)
    assert_average_of_the_weights(folder, averages_of(last(folder, 3)), 3)


def test_turned_on_later_it_begins_with_the_weights_and_resumes_bitwise(two_ranks, even_file, tmp_path):
    begin, whole, resumed = (tmp_path / name for name in ("begin", "whole", "resumed"))
    options = [*LENGTH, "--checkpoint.save_interval", "1", "--parallel.tensor", "2", "--run_folder"]
    two_ranks.run(tiny_run.train_until, even_file, [*options, str(begin)], 2)
    for folder in (whole, resumed):
        tiny_run.copy_of(begin, folder)
    on = ["--training.ema_decay", str(DECAY), "--training.ema_dtype", "bf16"]
    two_ranks.run(tiny_run.train, even_file, [*options, str(whole), *on])
    weights = tiny_run.tensors_of(last(whole, 2))
    names = averages_of(last(whole)).keys()
    assert_average_of_the_weights(whole, {name: weights[name] for name in names}, 2)
    two_ranks.run(tiny_run.train_until, even_file, [*options, str(resumed), *on], 4)
    two_ranks.run(tiny_run.train, even_file, [*options, str(resumed), *on])
    mine, theirs = (tiny_run.tensors_of(last(folder)) for folder in (resumed, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_turned_on_later_and_off_again(one_rank, even_file, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    options = [*LENGTH, "--checkpoint.save_interval", "1", "--run_folder", str(folder)]
    tiny_run.train_until(one_rank, even_file, options, 2)
    tiny_run.train_until(one_rank, even_file, [*options, *EMA], 4)
    assert "step-00000002 holds no moving average of the weights" in capsys.readouterr().out
    weights = tiny_run.tensors_of(last(folder, 2))
    found, after = averages_of(last(folder, 3)), tiny_run.tensors_of(last(folder, 3))
    for name, mean in found.items():
        assert torch.equal(mean, weights[name] + (after[name] - weights[name]) * (1 - DECAY))
    tiny_run.train(one_rank, even_file, options)
    printed = capsys.readouterr().out
    assert (
        "which is not continued: training.ema_decay is null" in printed and "training.ema_decay 0.9 -> null" in printed
    )
    assert not averages_of(last(folder))
    theirs = tiny_run.tensors_of(last(runs["fp32"]))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tiny_run.tensors_of(last(folder)).items())


def test_a_wider_dtype_is_exact_and_a_narrower_one_is_refused(one_rank, even_file, runs, tmp_path):
    wider = tiny_run.copy_of(runs["bf16"], tmp_path / "wider")
    run = pretrain.build(tiny_run.configure(even_file, *EMA, "--run_folder", str(wider)), one_rank)
    there = averages_of(last(wider))
    assert all(torch.equal(mean, there[name].float()) for name, mean in average_of(run.optimizer).tensors().items())
    narrower = ["--training.ema_dtype", "bf16", "--run_folder", str(tiny_run.copy_of(runs["fp32"], tmp_path / "fp32"))]
    assert "training.ema_dtype asks for bfloat16" in tiny_run.refusal(one_rank, even_file, [*EMA, *narrower])


def test_a_rollback_restores_it(one_rank, even_file, runs, tmp_path):
    folder = tiny_run.copy_of(runs["bf16"], tmp_path / "run")
    options = [*EMA, "--training.ema_dtype", "bf16", "--training.train_tokens", "9999", "--run_folder", str(folder)]
    run = pretrain.build(tiny_run.configure(even_file, *options), one_rank)
    manifest = read_manifest(last(folder, 2))
    progress = Progress(2, 48, manifest.consumed_tokens, {})
    roll_back(run, Rollback(last(folder, 2), manifest, progress, manifest.health, "back"))
    there = averages_of(last(runs["bf16"], 2))
    assert all(torch.equal(mean, there[name]) for name, mean in average_of(run.optimizer).tensors().items())


def test_evaluated_and_exported(one_rank, even_file, runs, tmp_path):
    """The losses of the run are those that the exported average has, and the training does not notice."""
    options = [*EMA, "--training.eval_ema", "true", "--training.eval_interval", "3", "--checkpoint.keep_best", "true"]
    options += ["--checkpoint.export_hf", "true", "--checkpoint.export_ema", "true", "--run_folder"]
    tiny_run.train(one_rank, even_file, [*options, str(tmp_path / "run")])
    mine, theirs = (tiny_run.tensors_of(last(folder)) for folder in (tmp_path / "run", runs["fp32"]))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    exported = load_file(tmp_path / "run/hf/step-00000006/model.safetensors")
    assert exported.keys() == averages_of(last(tmp_path / "run")).keys()
    assert all(torch.equal(tensor, mine[f"ema.{name}"]) for name, tensor in exported.items())
    start = ["--model.initialize_from", str(tmp_path / "run/hf/step-00000006"), "--run_folder", str(tmp_path / "new")]
    run = pretrain.build(tiny_run.configure(even_file, *start), one_rank)
    losses = run.validation.evaluate(run.forward_backward, 0, lambda: False, print)
    evaluations = [r for r in tiny_run.records(tmp_path / "run") if "evaluation" in r]
    assert losses["validation"] == pytest.approx(evaluations[-1]["loss"], rel=1e-6)
    weights = [r for r in tiny_run.records(runs["fp32"]) if "evaluation" in r]
    assert weights[-1]["loss"] != pytest.approx(evaluations[-1]["loss"], rel=1e-3)
    again = run_lines(one_rank, even_file, [*options, str(tmp_path / "run")])
    assert any("already exists" in line for line in again)
    changed = [*options, str(tmp_path / "run"), "--checkpoint.export_ema", "false"]
    assert "names another checkpoint or export_ema" in run_lines(one_rank, even_file, changed)[-1]


def run_lines(ranks, path: Path, overrides: list[str]) -> list[str]:
    said: list[str] = []
    try:
        run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
        run.say = lambda *lines: said.extend(lines)
        pretrain.train(run)
    except UserError as error:
        said.append(str(error))
    return said


def test_sizes(one_rank, even_file, runs, tmp_path):
    for dtype, folder in runs.items():
        options = [*EMA, "--training.ema_dtype", dtype, "--run_folder", str(tmp_path)]
        run = pretrain.build(tiny_run.configure(even_file, *options), one_rank)
        stored = tiny_run.tensors_of(last(folder))
        written = sum(tensor.nbytes for tensor in stored.values() if tensor.ndim)  # but for counts of steps
        assert checkpoint_bytes(run.config, run.start.architecture) == written
        assert any(f"average     of the weights in {dtype}, decay 0.9" in line for line in describe_start(run))


def test_the_converter(run, runs, one_rank, even_file, tmp_path):
    checkpoint = last(runs["bf16"])
    export = lambda output, *options: run(  # noqa: E731
        export_command, "--checkpoint", checkpoint, "--output", tmp_path / output, "--dtype", "float32", *options
    )
    plain, averaged = export("plain"), export("averaged", "--ema")
    assert plain.status == averaged.status == 0, plain.stderr + averaged.stderr
    assert "moving average of the weights, which --ema exports" in plain.stdout
    tensors = tiny_run.tensors_of(checkpoint)
    for folder, prefix in (("plain", ""), ("averaged", "ema.")):
        exported = load_file(tmp_path / folder / "model.safetensors")
        assert len(exported) > 10
        assert all(torch.equal(tensor, tensors[prefix + name].float()) for name, tensor in exported.items())
    assert json.loads((tmp_path / "averaged/conversion.json").read_text())["options"]["ema"] is True
    start = ["--model.initialize_from", str(checkpoint), "--training.ema_decay", "0.5", "--run_folder", str(tmp_path)]
    new = pretrain.build(tiny_run.configure(even_file, *start), one_rank)
    for name, mean in average_of(new.optimizer).tensors().items():  # a new run begins with the weights
        assert torch.equal(mean, tensors[name])


def test_refusals(run, reference, run_file, one_rank, tmp_path):
    checkpoint = reference / "checkpoints/step-00000020"
    refused = run(export_command, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--ema")
    assert_refused(refused, "holds no moving average", "training.ema_decay")
    for option in ("training.eval_ema", "checkpoint.export_ema"):
        assert "training.ema_decay is null" in tiny_run.refusal(one_rank, run_file, [f"--{option}", "true"])
    for decay in ("0", "1", "1.5"):
        assert "in (0, 1)" in tiny_run.refusal(one_rank, run_file, ["--training.ema_decay", decay])
