"""Losses of routers are those of the global batch: the same gradients, counts and values in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mixtures
import parity_run
import pytest
import tiny_run
import torch
import yaml
from torch import Tensor

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.evaluation import count_targets
from retemper.engine.observe.start_summary import _describe_notes
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.manifest import Manifest, read_manifest

COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.02}
BIASED = {
    "model_type": "glm4_moe",
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "head_dim": 8,
    "attention_bias": True,
}
"""GLM-4.5: sigmoid scores, groups, a bias for the choice, a dense layer."""
CASES = [
    (1, "training.micro_batch_size=4"),
    (1, "parallel.recompute=full"),
    (2, "parallel.shard=2"),
    (2, "parallel.context=2"),
    (2, "parallel.tensor=2"),
    (2, "parallel.pipeline=2"),
    (2, "parallel.expert=2"),
    pytest.param(4, "parallel.expert=2 parallel.tensor=2", marks=pytest.mark.slow),
    pytest.param(2, "parallel.expert=2 parallel.context=2 parallel.context_kind=ring", marks=pytest.mark.slow),
    pytest.param(4, "parallel.expert=2 parallel.shard=4 parallel.recompute=full", marks=pytest.mark.slow),
    pytest.param(1, "parallel.recompute=selective", marks=pytest.mark.slow),
    pytest.param(2, "parallel.replicate=2", marks=pytest.mark.slow),
    pytest.param(2, "parallel.shard=2 parallel.reduce_gradients=step", marks=pytest.mark.slow),
    pytest.param(
        2,
        "parallel.pipeline=2 parallel.pipeline_schedule=interleaved_zero_bubble parallel.pipeline_stages_per_rank=2 "
        "parallel.reshard_after_forward=false",
        marks=pytest.mark.slow,
    ),
    pytest.param(4, "parallel.pipeline=2 parallel.shard=2", marks=pytest.mark.slow),
]


class Outcome(NamedTuple):
    """What a rank has to show of the third step."""

    losses: list[float]
    """Of all steps."""
    gradients: dict[str, Tensor]
    numbers: Any
    state: dict[str, str]
    biases: dict[str, Tensor]


def write_run(folder: Path, family: dict[str, Any], **training: Any) -> Path:
    path = parity_run.write_run(folder, parity_run.Model("qwen3", tied=False, packed=True))
    config = yaml.safe_load(path.read_text())
    config["model"]["architecture"] |= {"model_type": "qwen3_moe", "initializer_range": 0.2, **family}
    config["training"] |= training
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def three_steps(ranks: Ranks, path: Path, overrides: list[str]) -> Outcome:
    run = pretrain.build(parse_config(["--config", str(path), *overrides]), ranks)
    accumulate, gradients, losses = run.forward_backward.accumulate_gradients, {}, []

    def accumulate_gradients(*arguments: Any) -> Tensor:
        loss = accumulate(*arguments)
        learned = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
        gradients.update(parity_run._whole(learned))
        return loss

    run.forward_backward.accumulate_gradients = accumulate_gradients  # type: ignore[method-assign]
    for step in range(3):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
        losses.append(ranks.all_reduce(pretrain.one_step(run, batches, num_targets).loss.item()))
    routers = run.model.routers
    assert routers is not None and routers.numbers is not None
    biases = {name: tiny_run.whole(p) for name, p in run.model.named_parameters() if name in run.model.constants}
    return Outcome(losses, gradients, routers.read(routers.numbers.tolist()), routers.state_dict(), biases)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("routers"), mixtures.FAMILIES["qwen3_moe"], **COEFFICIENTS)


@pytest.fixture(scope="module")
def expected(one_rank, path):
    return three_steps(one_rank, path, [])


@pytest.fixture(scope="module")
def biased(one_rank, tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("biased"), BIASED, **COEFFICIENTS, router_bias_update_rate=0.05)
    return path, three_steps(one_rank, path, [])


@pytest.mark.parametrize(("world_size", "settings"), CASES)
def test_same_as_one_process(world_size, settings, path, expected, one_rank, request):
    check(world_size, settings, path, expected, one_rank, request)


@pytest.mark.parametrize("settings", ["parallel.shard=2", "parallel.tensor=2", "parallel.pipeline=2"])
def test_biases_are_the_same_on_all_ranks(settings, biased, one_rank, request):
    path, expected = biased
    assert len(expected.biases) == 3 and all(bias.any() for bias in expected.biases.values())
    check(2, settings, path, expected, one_rank, request)


@pytest.mark.parametrize(("pattern", "moves"), [("*.experts.*", False), ("*.3.mlp.gate.weight", True)])
def test_a_rate_that_moves_no_bias_is_named_at_the_start(pattern, moves, biased, one_rank):
    options = ["--config", str(biased[0]), "--training.trainable", f"['{pattern}']"]
    run = pretrain.build(parse_config(options), one_rank)
    line = (
        "note: training.router_bias_update_rate 0.05 has no effect: no router of the model chooses experts with a bias"
    )
    assert any(note.startswith(line) for note in _describe_notes(run)) != moves


def check(world_size, settings, path, expected, one_rank, request):
    options = [part for setting in settings.split() for part in ("--" + setting).split("=")]
    if world_size == 1:
        outcomes = [three_steps(one_rank, path, options)]
    else:
        cluster = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
        outcomes = cluster.run(three_steps, path, options)
    found: set[str] = set()
    biases: set[str] = set()
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.state == expected.state and outcome.numbers.loads == expected.numbers.loads
        assert outcome.numbers[:2] == pytest.approx(expected.numbers[:2], rel=1e-5)
        for name, bias in outcome.biases.items():
            assert torch.equal(bias, expected.biases[name]), name
            biases.add(name)
        for name, tensor in outcome.gradients.items():
            assert (tensor - expected.gradients[name]).norm() <= 1e-4 * expected.gradients[name].norm(), name
            found.add(name)
    assert found == expected.gradients.keys() and biases == expected.biases.keys()


def test_the_losses_are_in_the_gradients_and_not_in_the_loss(one_rank, path, expected):
    plain = three_steps(one_rank, path, ["--training.router_aux_loss_coef", "0", "--training.router_z_loss_coef", "0"])
    assert plain.losses[0] == expected.losses[0]
    gate = "model.layers.0.mlp.gate.weight"
    assert (plain.gradients[gate] - expected.gradients[gate]).norm() > 0.1 * plain.gradients[gate].norm()
    total = sum(int(number) for number in expected.state["0"].split())
    assert total == 2 * 32 * parity_run.GLOBAL_BATCH and len(expected.state) == 2 * 4 + 1  # with those of the window
    assert all(torch.isfinite(gradient).all() for gradient in expected.gradients.values())


@pytest.fixture(scope="module")
def undisturbed(one_rank, path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    parity_run.run_until(one_rank, path, ["--run_folder", str(folder)], parity_run.STEPS)
    return folder


def manifest(folder: Path, step: int) -> Manifest:
    return read_manifest(folder / "checkpoints" / f"step-{step:08}")


def test_a_resumed_run_has_the_same_bits_and_a_rollback_the_load_of_its_checkpoint(
    one_rank, path, undisturbed, tmp_path
):
    options = ["--run_folder", str(tmp_path)]
    parity_run.run_until(one_rank, path, options, 4)  # saved at 3
    run = pretrain.build(parse_config(["--config", str(path), *options]), one_rank)
    pretrain.train(run)
    last = parity_run.STEPS
    expected, actual = (parity_run.checkpoint(folder, last) for folder in (undisturbed, tmp_path))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    loads = manifest(undisturbed, last).router_load
    assert loads and loads == manifest(tmp_path, last).router_load and loads != manifest(tmp_path, 3).router_load
    routers = run.model.routers
    assert routers is not None and routers.numbers is not None and routers.state_dict() == loads
    ours, theirs = parity_run.records(tmp_path), parity_run.records(undisturbed)
    keys = ["loss", "router_aux_loss", "router_z_loss", "expert_load_max", "expert_load/layer_3"]
    assert [[record[key] for key in keys] for record in ours] == [[record[key] for key in keys] for record in theirs]
    assert ours[-1]["router_aux_loss"] == routers.read(routers.numbers.tolist()).aux_loss > 2

    saved = tmp_path / "checkpoints" / "step-00000003"
    run.start.at_checkpoint(saved, manifest(tmp_path, 3)).load_into(run.model, run.optimizer)
    assert routers.state_dict() == manifest(tmp_path, 3).router_load


def test_a_checkpoint_without_the_load_begins_uniform_and_says_so(one_rank, path, undisturbed, tmp_path):
    folder = tiny_run.copy_of(undisturbed, tmp_path / "run")
    saved = folder / "checkpoints" / f"step-{parity_run.STEPS:08}" / "manifest.json"
    tiny_run.rewrite_manifest(saved, lambda content: content.pop("router_load"))
    options = ["--config", str(path), "--run_folder", str(folder), "--training.train_tokens", str(9 * 8 * 32)]
    run = pretrain.build(parse_config(options), one_rank)
    assert run.model.routers is not None and run.model.routers.state_dict() == {}
    assert [line for line in run.remarks if "no load of experts" in line]
    run = pretrain.build(parse_config([*options, "--training.router_aux_loss_coef", "0"]), one_rank)
    assert not [line for line in run.remarks if "no load of experts" in line]


@pytest.mark.slow
def test_a_checkpoint_of_another_layout_continues(two_ranks, one_rank, path, undisturbed, tmp_path):
    options = ["--run_folder", str(tmp_path)]
    two_ranks.run(parity_run.run_until, path, [*options, "--parallel.pipeline", "2"], 4)
    parity_run.run_until(one_rank, path, options, parity_run.STEPS)
    assert manifest(tmp_path, parity_run.STEPS).router_load == manifest(undisturbed, parity_run.STEPS).router_load
    actual = parity_run.checkpoint(tmp_path, parity_run.STEPS)
    for name, tensor in parity_run.checkpoint(undisturbed, parity_run.STEPS).items():
        assert (actual[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
