"""fp16 training with loss scaling: against torch.amp.GradScaler and transformers, in every layout, and resumed."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from typing import NamedTuple

import faulty_run
import parity_run
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from retemper.engine import pretrain
from retemper.engine.config.settings import TrainingConfig
from retemper.engine.evaluation import count_targets
from retemper.engine.optim.loss_scaling import LossScaler
from retemper.engine.schedule import learning_rate

FP16 = ["--training.precision", "fp16", "--training.micro_batch_size", "2"]
SEARCHING = [*FP16, "--training.initial_loss_scale", str(2**21), "--training.loss_scale_window", "3"]
"""Overflows in the first steps, and again whenever the scale has grown."""
GROWING = [*FP16, "--training.initial_loss_scale", str(2**12), "--training.loss_scale_window", "3"]
"""No overflows. Where the first ones occur depends on the layout: a rank with half of the tokens has smaller sums."""
STEPS = 14


class Trace(NamedTuple):
    """What some steps did."""

    losses: list[float]
    norms: list[float]
    """Zero if it is not finite."""
    scales: list[float]
    """After each step."""
    skipped: list[bool]
    weights: dict[str, torch.Tensor]


def ours(ranks, path, overrides, steps=STEPS, weights=None) -> Trace:
    """Steps of a run, which may start from other weights."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            dict(run.model.named_parameters())[name].copy_(weight)
    scaler = run.guards.step_guard.loss_scaler
    trace = Trace([], [], [], [], {})
    overflows = 0.0
    for _ in range(steps):
        batches = run.data.micro_batches(run.progress.samples)
        result = pretrain.one_step(run, batches, ranks.all_reduce(count_targets(batches, run.mesh)))
        trace.losses.append(ranks.all_reduce(result.loss.item()))
        trace.norms.append(_finite(result.grad_norm.item()))
        trace.scales.append(scaler.scale.item())
        trace.skipped.append(scaler.state[2].item() > overflows)
        overflows = scaler.state[2].item()
    trace.weights.update({name: tiny_run.whole(p) for name, p in run.model.named_parameters()})
    return trace


def with_grad_scaler(one_rank, path, overrides) -> Trace:
    """The same steps by transformers, torch.amp.GradScaler and torch.optim.AdamW."""
    run = pretrain.build(tiny_run.configure(path, *overrides), one_rank)
    config = run.config
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in run.model.named_parameters()}
    half = Qwen3ForCausalLM(Qwen3Config(**config.model.architecture)).half()
    copies = dict(half.named_parameters())
    assert copies.keys() == masters.keys()
    groups = [
        {"params": [p for p in masters.values() if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in masters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = config.optimizer.beta1, config.optimizer.beta2
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.optimizer.eps)
    training = config.training
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=training.initial_loss_scale, growth_interval=training.loss_scale_window
    )
    trace = Trace([], [], [], [], {})
    for step in range(STEPS):
        batches = run.data.micro_batches(step * run.plan.global_batch_size)
        num_targets = count_targets(batches, run.mesh)
        rate = learning_rate((step + 1) * run.plan.tokens_per_step, training, config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            for name, master in masters.items():
                copies[name].copy_(master)
                master.grad = torch.zeros_like(master)
        total = 0.0
        for batch in batches:
            loss = _loss_sum(half, batch) / num_targets
            scaler.scale(loss).backward()
            total += loss.item()
            for name, master in masters.items():
                master.grad += copies[name].grad.float()
                copies[name].grad = None
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(masters.values(), config.optimizer.clip_grad_norm)
        trace.norms.append(_finite(norm.item()))
        before = masters["model.norm.weight"].detach().clone()
        scaler.step(optimizer)
        trace.skipped.append(torch.equal(before, masters["model.norm.weight"]))
        scaler.update()
        trace.losses.append(total)
        trace.scales.append(scaler.get_scale())
    trace.weights.update({name: p.detach() for name, p in masters.items()})
    return trace


def _finite(number):
    return number if math.isfinite(number) else 0.0


def _loss_sum(model, batch):
    """One document after the other, and whole logits."""
    bounds = batch.cu_seqlens.tolist()
    total = torch.zeros(())
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            logits = model(batch.tokens[None, start:stop], position_ids=batch.position_ids[None, start:stop]).logits[0]
            total = total + F.cross_entropy(logits.float(), batch.targets[start:stop], reduction="sum")
    return total


def _near(actual: Trace, expected: Trace):
    """fp16 rounds to 11 bits: losses and weights of both differ by that much, decisions not at all."""
    assert actual.scales == expected.scales
    assert actual.skipped == expected.skipped
    assert actual.losses == pytest.approx(expected.losses, rel=1e-3)
    assert actual.norms == pytest.approx(expected.norms, rel=2e-2)
    for name, weight in expected.weights.items():
        assert (actual.weights[name] - weight).norm() <= 1e-2 * weight.norm(), name


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A run whose model can be divided by two."""
    return parity_run.write_run(tmp_path_factory.mktemp("fp16"), parity_run.Model("qwen3", tied=False, packed=True))


@pytest.fixture(scope="module")
def searching(one_rank, model_file):
    """The steps of one process, whose scale falls and rises."""
    trace = ours(one_rank, model_file, SEARCHING)
    assert sum(trace.skipped) >= 4 and len(set(trace.scales)) > 1
    return trace


@pytest.fixture(scope="module")
def growing(one_rank, model_file):
    """The steps of one process, whose scale rises."""
    trace = ours(one_rank, model_file, GROWING, steps=7)
    assert not any(trace.skipped) and trace.scales[-1] == 2**14
    return trace


def test_steps_equal_those_of_grad_scaler_and_transformers(searching, one_rank, model_file):
    _near(searching, with_grad_scaler(one_rank, model_file, SEARCHING))


@pytest.mark.parametrize(("window", "share"), [(1, 0.5), (2, 0.7), (5, 0.85)])
def test_the_scale_is_that_of_grad_scaler(window, share):
    config = TrainingConfig(train_tokens=1, precision="fp16", initial_loss_scale=2.0**30, loss_scale_window=window)
    ours = LossScaler(config, torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=window)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    finite = torch.rand(200, generator=torch.Generator().manual_seed(window)) < share
    for step, good in enumerate(finite.tolist()):
        theirs.scale(weight.sum()).backward()
        weight.grad = torch.full((1,), 1.0 if good else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(torch.ones(()), torch.tensor(float(not good))).item() == (not good)
        if step == 77:  # a resumed run
            state = json.loads(json.dumps(ours.state_dict()))
            ours = LossScaler(config, torch.device("cpu"))
            ours.load_state_dict(state)
        assert ours.scale.item() == theirs.get_scale()
    assert ours.state[2].item() == (~finite).sum()


@pytest.mark.parametrize(
    "layout",
    [
        "shard=2",
        "tensor=2",
        "pipeline=2",
        "context=2",
        pytest.param("shard=2 reduce_gradients=step", marks=pytest.mark.slow),
        pytest.param("tensor=2 recompute=selective", marks=pytest.mark.slow),
    ],
)
def test_layouts_make_the_same_steps(layout, growing, two_ranks, model_file):
    overrides = [*GROWING]
    for setting in layout.split():
        key, value = setting.split("=")
        overrides += [f"--parallel.{key}", value]
    first, second = two_ranks.run(ours, model_file, overrides, 7)
    assert first[:4] == second[:4]
    first.weights.update(second.weights)  # of the other stage of a pipeline
    _near(first, growing)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_bit(recompute, searching, one_rank, model_file):
    trace = ours(one_rank, model_file, [*SEARCHING, "--parallel.recompute", recompute])
    assert trace[:4] == searching[:4]
    assert all(torch.equal(trace.weights[name], weight) for name, weight in searching.weights.items())


@pytest.mark.parametrize(
    "options",
    [
        ["--model.implementation", "transformers"],
        ["--optimizer.state_dtype", "bf16", "--optimizer.clip_grad_norm", "0"],
    ],
)
def test_other_models_and_optimizers_make_the_same_decisions(options, searching, one_rank, model_file):
    start = ours(one_rank, model_file, SEARCHING, steps=0).weights
    trace = ours(one_rank, model_file, [*SEARCHING, *options], 4, start)
    assert trace.scales == searching.scales[:4] and trace.skipped == searching.skipped[:4]
    assert trace.losses[:3] == pytest.approx(searching.losses[:3], rel=1e-3)


def test_an_interrupted_run_is_bitwise_the_undisturbed_run(two_ranks, run_file, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    two_ranks.run(tiny_run.train, run_file, [*SEARCHING, "--run_folder", str(whole)])
    shutil.copytree(whole, broken)
    for step in (16, 20):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    two_ranks.run(tiny_run.train, run_file, [*SEARCHING, "--run_folder", str(broken)])
    kept = ("step", "loss", "grad_norm", "loss_scale", "overflow_steps", "skipped_steps")
    curves = [[tuple(r.get(key) for key in kept) for r in tiny_run.records(folder)] for folder in (whole, broken)]
    assert curves[0] == curves[1]
    last = curves[0][-2]
    assert last[4] > 2 and last[5] == 0
    expected, actual = (tiny_run.tensors_of(folder / "checkpoints/step-00000020") for folder in (whole, broken))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    health = json.loads((broken / "checkpoints/step-00000020/manifest.json").read_text())["health"]
    assert health["skipped_steps"] == 0 and health["loss_scaling"]["overflows"] == last[4]


SHORT = ["--training.train_tokens", str(10 * 8 * 32), "--training.eval_interval", "0"]


def test_the_search_for_a_scale_does_not_end_the_run(one_rank, run_file, tmp_path, capsys):
    many = ["--training.initial_loss_scale", str(2**34), "--training.max_skipped_steps", "2", "--training.train_tokens"]
    tiny_run.train(one_rank, run_file, [*FP16, *many, str(20 * 8 * 32), "--run_folder", str(tmp_path)])
    last = [record for record in tiny_run.records(tmp_path) if "evaluation" not in record][-1]
    assert last["overflow_steps"] > 10 and last["skipped_steps"] == 0 and last["grad_norm"] > 0
    assert "fp16 gradients overflowed; the loss scale is now" in capsys.readouterr().out


def test_a_scale_below_the_minimum_ends_the_run(one_rank, run_file, tmp_path):
    options = ["--training.initial_loss_scale", "4", "--training.min_loss_scale", "2", "--run_folder", str(tmp_path)]
    said = faulty_run.train(one_rank, run_file, [*FP16, *SHORT, *options], dict.fromkeys((5, 6, 7), "gradient"))
    assert said is not None and said.startswith("step 6: the loss scale fell below training.min_loss_scale 2")
    assert "\n" not in said and "set training.precision to fp32" in said and "step-00000004" in said


@pytest.mark.parametrize("layout", ["shard", "pipeline", "tensor", "context"])
def test_a_fault_on_one_rank_is_the_same_on_all(layout, two_ranks, model_file, tmp_path):
    """A gradient that is not finite is an overflow, and a loss that is not finite is none."""
    options = [*FP16, *SHORT, "--training.initial_loss_scale", "1024", f"--parallel.{layout}", "2"]
    options += ["--run_folder", str(tmp_path)]
    faults = {4: "gradient", 5: "gradient", 7: "loss"}
    assert two_ranks.run(faulty_run.train, model_file, options, faults, 1) == [None, None]
    seen = [(r["overflow_steps"], r["skipped_steps"], r["loss_scale"]) for r in tiny_run.records(tmp_path)]
    assert seen == [(0, 0, 1024)] * 3 + [(1, 0, 512), (2, 0, 256), (2, 0, 256)] + [(2, 1, 128)] * 4
