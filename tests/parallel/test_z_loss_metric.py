"""``training.z_loss`` in the metrics: float64 values of transformers, the same in every layout, and no other effect."""

from __future__ import annotations

from pathlib import Path

import parity_run
import pytest
import tiny_run
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX

FACTOR = 0.01
STEPS = 3
CASES = [
    (1, "training.micro_batch_size=4"),
    (1, "training.precision=fp16 training.initial_loss_scale=4096"),
    (1, "model.implementation=transformers"),
    (2, "parallel.shard=2"),
    (2, "parallel.context=2"),
    (2, "parallel.tensor=2"),
    (2, "parallel.pipeline=2"),
    pytest.param(
        2,
        "parallel.pipeline=2 parallel.pipeline_schedule=interleaved_zero_bubble parallel.pipeline_stages_per_rank=2 "
        "parallel.reshard_after_forward=false",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    model = parity_run.Model("qwen2", tied=False, packed=True)
    return parity_run.write_run(tmp_path_factory.mktemp("z_loss"), model)


def configured(path: Path, *options: str, factor: float = FACTOR) -> list[str]:
    return ["--config", str(path), "--training.z_loss", str(factor), *options]


def measured(ranks: Ranks, path: Path, options: list[str]) -> list[float | None]:
    """The z-losses of the first steps, of all ranks together; weights change between them."""
    run = pretrain.build(parse_config(configured(path, *options)), ranks)
    values = []
    for step in range(STEPS):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
        result = pretrain.one_step(run, batches, num_targets)
        assert result.z_loss is not None
        values.append(ranks.all_reduce(result.z_loss.item()))
    return values


def float64_means(ranks: Ranks, path: Path, options: list[str]) -> list[float]:
    """transformers, on each document alone, with the weights that the run has before each step."""
    config = parse_config(configured(path, *options))
    run = pretrain.build(config, ranks)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.model.architecture)).double()
    means = []
    for step in range(STEPS):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        hf.load_state_dict({name: parameter.detach().double() for name, parameter in run.model.named_parameters()})
        squares = []
        for batch in batches:
            starts = (batch.position_ids == 0).nonzero().flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], len(batch.tokens)], strict=True):
                with torch.no_grad():
                    logits_TV = hf(batch.tokens[None, start:stop]).logits[0]
                squares.append(logits_TV.logsumexp(-1).square()[batch.targets[start:stop] != IGNORE_INDEX])
        means.append(torch.cat(squares).mean().item())
        pretrain.one_step(run, batches, count_targets(batches, run.mesh))
    return means


@pytest.fixture(scope="module")
def expected(one_rank, path) -> list[float]:
    return float64_means(one_rank, path, [])


def test_one_process_has_the_values_of_transformers(one_rank, path, expected):
    assert measured(one_rank, path, []) == pytest.approx(expected, rel=1e-5)
    assert expected[0] > 1 and len(set(expected)) == STEPS


@pytest.mark.parametrize(("world_size", "settings"), CASES)
def test_every_layout_has_them(world_size, settings, path, expected, one_rank, request):
    options = [part for setting in settings.split() for part in ("--" + setting).split("=")]
    if "transformers" in settings:  # its random weights are others
        expected = float64_means(one_rank, path, options)
    if world_size == 1:
        outcomes = [measured(one_rank, path, options)]
    else:
        outcomes = request.getfixturevalue("two_ranks").run(measured, path, options)
    tolerance = 1e-4 if "fp16" in settings else 1e-5  # fp16 rounds what is multiplied to 11 bits
    for outcome in outcomes:
        assert outcome == pytest.approx(expected, rel=tolerance)


def test_gradients_have_the_same_bits_with_and_without_the_sum(one_rank, path):
    def gradients(counted: bool) -> dict[str, Tensor]:
        run = pretrain.build(parse_config(configured(path)), one_rank)
        if not counted:
            run.model.decoders[0].on_z_loss = None
        batches = run.data.micro_batches(0)
        run.forward_backward.accumulate_gradients(batches, count_targets(batches, run.mesh), lambda phase: None)
        return {name: parameter.grad for name, parameter in run.model.named_parameters()}

    without = gradients(False)
    assert all(torch.equal(gradient, without[name]) for name, gradient in gradients(True).items())


def test_it_is_in_the_records_next_to_the_loss(one_rank, path, expected, tmp_path):
    options = ["--training.train_steps", str(STEPS), "--optimizer.min_learning_rate_ratio", "null", "--run_folder"]
    pretrain.train(pretrain.build(parse_config(configured(path, *options, str(tmp_path / "run"))), one_rank))
    records = parity_run.records(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["z_loss"] == pytest.approx(expected[0], rel=1e-5)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("train/z_loss")]
    assert shown == pytest.approx([record["z_loss"] for record in records], rel=1e-6)


def test_nothing_is_computed_or_recorded_without_a_factor(one_rank, path, tmp_path):
    options = ["--training.train_steps", "2", "--run_folder", str(tmp_path / "run")]
    run = pretrain.build(parse_config(configured(path, *options, factor=0.0)), one_rank)
    assert run.model.z_loss is None and run.model.decoders[0].on_z_loss is None
    pretrain.train(run)
    assert "z_loss" not in parity_run.records(tmp_path / "run")[0] and tiny_run.curve(tmp_path / "run")
