"""``training.trainable: embeddings``: what is frozen stays bitwise as it was, and the rest learns as it would."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml

from retemper.benchmarks.step.measure import measure_step
from retemper.benchmarks.step.options import StepBenchmarkOptions
from retemper.engine import pretrain
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.observe import progress
from retemper.engine.observe.start_summary import describe_model
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.weights.checkpoint.tensors import stored_tensors
from retemper.tools.plan import main as plan
from retemper.tools.planning import command as planning_command
from retemper.tools.planning.formulas import rough_prediction
from retemper.tools.planning.gpus import GPUS
from retemper.tools.planning.options import Assumptions, ClusterSpec
from retemper.tools.planning.pool import DryRunPool

EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}
STEPS = 10
ONLY = ["--training.trainable", "embeddings", "--training.train_tokens", str(STEPS * 8 * 32)]


@pytest.fixture(scope="module")
def untied_file(run_file, tmp_path_factory) -> Path:
    """The tiny run with a head of its own and a vocabulary that two ranks can share."""
    config = yaml.safe_load(run_file.read_text())
    config["model"]["architecture"] |= {"tie_word_embeddings": False, "vocab_size": tiny_run.VOCAB_SIZE + 1}
    path = tmp_path_factory.mktemp("untied") / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stage_one(one_rank, untied_file, tmp_path_factory) -> Path:
    """Run folder of an undisturbed run of the embeddings alone."""
    folder = tmp_path_factory.mktemp("stage_one") / "run"
    tiny_run.train(one_rank, untied_file, ["--run_folder", str(folder), *ONLY])
    return folder


def first_weights(ranks, path: Path, folder: Path) -> dict[str, torch.Tensor]:
    run = pretrain.build(tiny_run.configure(path, "--run_folder", str(folder)), ranks)
    return {name: tiny_run.whole(parameter) for name, parameter in run.model.named_parameters()}


def present_gradients(ranks, path: Path, overrides: list[str]) -> dict[str, torch.Tensor | None]:
    """Full gradients of the first global batch; None for parameters without."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    batches = run.data.micro_batches(0)
    num_targets = ranks.all_reduce(tiny_run.count_targets(batches, run.mesh))
    run.forward_backward.accumulate_gradients(batches, num_targets, lambda phase: None)
    return {name: None if p.grad is None else tiny_run.whole(p.grad) for name, p in run.model.named_parameters()}


def test_only_embeddings_change_and_only_they_have_states(one_rank, untied_file, stage_one, tmp_path):
    before = first_weights(one_rank, untied_file, tmp_path)
    last = sorted((stage_one / "checkpoints").iterdir())[-1]
    after = tiny_run.tensors_of(last)
    assert before.keys() >= EMBEDDINGS and len(before) > 20
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == (name not in EMBEDDINGS), name
    states = {name for name in stored_tensors(last) if name.startswith("optimizer.")}
    assert states == {f"optimizer.{s}.{name}" for s in ("step", "exp_avg", "exp_avg_sq") for name in EMBEDDINGS}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_those_of_the_whole_run(one_rank, untied_file, tmp_path, recompute):
    folder = ["--run_folder", str(tmp_path), "--parallel.recompute", recompute]
    whole = present_gradients(one_rank, untied_file, folder)
    some = present_gradients(one_rank, untied_file, [*folder, *ONLY])
    assert {name for name, gradient in some.items() if gradient is not None} == EMBEDDINGS
    for name in EMBEDDINGS:
        torch.testing.assert_close(some[name], whole[name], rtol=1e-6, atol=1e-9)


def test_norm_is_that_of_the_embeddings(one_rank, untied_file, stage_one, tmp_path):
    gradients = present_gradients(one_rank, untied_file, ["--run_folder", str(tmp_path), *ONLY])
    expected = sum(gradients[name].double().square().sum() for name in EMBEDDINGS).sqrt()
    first = next(record for record in tiny_run.records(stage_one) if "grad_norm" in record)
    assert first["grad_norm"] == pytest.approx(expected.item(), rel=1e-5)


def test_resumed_bitwise(one_rank, untied_file, stage_one, tmp_path):
    overrides = ["--run_folder", str(tmp_path), *ONLY]
    tiny_run.train_until(one_rank, untied_file, overrides, 6)
    tiny_run.train(one_rank, untied_file, overrides)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(stage_one)
    mine, theirs = (tiny_run.tensors_of(run / "checkpoints" / f"step-{STEPS:08d}") for run in (tmp_path, stage_one))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "layout",
    [
        [],
        pytest.param(["--parallel.tensor", "2"], marks=pytest.mark.slow),
        ["--parallel.pipeline", "2"],
        pytest.param(
            ["--parallel.reduce_gradients", "step", "--training.micro_batch_size", "2"], marks=pytest.mark.slow
        ),
    ],
    ids=["shard", "tensor", "pipeline", "reduce once"],
)
def test_two_ranks_give_the_same_curve(two_ranks, untied_file, stage_one, tmp_path, layout):
    overrides = ["--run_folder", str(tmp_path), *ONLY, *layout, "--checkpoint.save_interval", "1000"]
    two_ranks.run(tiny_run.train, untied_file, overrides)
    for one, other in zip(tiny_run.curve(tmp_path), tiny_run.curve(stage_one), strict=True):
        assert one[:2] == other[:2] and one[2:] == pytest.approx(other[2:], rel=1e-5)


@pytest.fixture(scope="module")
def tied_stage_one(one_rank, run_file, tmp_path_factory) -> Path:
    """The same as :func:`stage_one`, of a model whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied_stage_one") / "run"
    tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *ONLY])
    return folder


@pytest.mark.parametrize(
    "axis", ["pipeline", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("context", "replicate"))]
)
def test_two_ranks_with_tied_embeddings(two_ranks, run_file, tied_stage_one, tmp_path, axis):
    """All that the last stage of a pipeline trains is its copy of the embedding, which the first one counts."""
    overrides = ["--run_folder", str(tmp_path), *ONLY, f"--parallel.{axis}", "2", "--checkpoint.save_interval", "1000"]
    two_ranks.run(tiny_run.train, run_file, overrides)
    for one, other in zip(tiny_run.curve(tmp_path), tiny_run.curve(tied_stage_one), strict=True):
        assert one[:2] == other[:2] and one[2:] == pytest.approx(other[2:], rel=1e-5)


def test_tied_embeddings_and_bf16_weights(one_rank, run_file, tmp_path):
    """With several micro-batches, bf16 weights have a hook on their gradients, which frozen ones cannot have."""
    overrides = ["--run_folder", str(tmp_path), *ONLY, "--training.weight_dtype", "bf16"]
    tiny_run.train(one_rank, run_file, [*overrides, "--training.train_tokens", "1024", "--training.warmup_tokens", "0"])
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    states = {name for name in stored_tensors(last) if name.startswith("optimizer.exp_avg.")}
    assert states == {"optimizer.exp_avg.model.embed_tokens.weight"}


def test_second_stage_starts_from_the_first(one_rank, untied_file, stage_one, tmp_path):
    last = sorted((stage_one / "checkpoints").iterdir())[-1]
    trained = tiny_run.tensors_of(last)
    run = pretrain.build(
        tiny_run.configure(untied_file, "--run_folder", str(tmp_path), "--model.initialize_from", str(last)), one_rank
    )
    for name, parameter in run.model.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, trained[name])


@pytest.fixture
def one_pool(dry_run_pool, monkeypatch):
    """The plan command uses the processes of these tests."""
    monkeypatch.setattr(planning_command, "DryRunPool", lambda: contextlib.nullcontext(dry_run_pool))


@pytest.fixture(scope="module")
def dry_run_pool():
    """One process for dry runs."""
    with DryRunPool(1) as processes:
        yield processes


def flops_of_embeddings(pair: int) -> int:
    """FLOPs of a token in samples of 32 tokens by hand, where only embeddings learn: matrices of the two blocks cost 2
    forward and 2 backward, of the head 2 and 4; attention makes ``pair`` products of width 32 in each of two layers."""
    block = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48
    return 4 * 2 * block + 6 * 32 * (tiny_run.VOCAB_SIZE + 1) + pair * 2 * 2 * 32 * 32


def test_speed_counts_no_gradients_of_frozen_weights(one_rank, untied_file, tmp_path, monkeypatch):
    """The MFU of the metrics, by a peak that is made up, and the summary."""
    monkeypatch.setattr(progress, "device_peak_flops", lambda device: 1e9)
    budget = ["--training.train_tokens", "512", "--training.warmup_tokens", "0", "--training.eval_interval", "0"]
    run = pretrain.build(
        tiny_run.configure(untied_file, "--run_folder", str(tmp_path / "run"), *ONLY, *budget), one_rank
    )
    pretrain.train(run)
    records = [record for record in tiny_run.records(tmp_path / "run") if "mfu" in record]
    expected = flops_of_embeddings(pair=6)
    assert len(records) == 2
    for record in records:
        assert record["mfu"] * 1e9 / record["tokens_per_second_per_rank"] == pytest.approx(expected)
    assert describe_model(run)[-1].startswith(f"FLOPs/token {expected:.4g} (all pairs")


def test_benchmark_counts_no_gradients_of_frozen_weights(one_rank, untied_file):
    config = tiny_run.configure(untied_file, *ONLY)
    found = measure_step(config, StepBenchmarkOptions(steps=1, warmup_steps=0, matmul_seconds=0.0), one_rank)
    assert found.flops_per_step["all pairs of positions"] == found.tokens_per_step * flops_of_embeddings(pair=6)
    assert found.flops_formula.startswith("FLOPs per token = 4 m (frozen) + 6 h v + 12 L")


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_plan_counts_no_gradients_of_frozen_weights(untied_file, tmp_path, one_pool, recompute):
    """Operators that a dry run sees, whose attention is 7 products of causal pairs, the formula of its MFU, and the
    closed formula that chooses what to dry run."""
    path = tmp_path / "plan.json"
    overrides = ["--training.precision", "bf16", "--parallel.recompute", recompute, *ONLY]
    plan(["--config", str(untied_file), "--gpus-per-node", "1", "--gpu", "h100-80gb", "--json", str(path), *overrides])
    record = json.loads(path.read_text())
    (rank,) = record["ranks"]
    if recompute == "none":
        assert rank["flops"] == 8 * 32 * (flops_of_embeddings(pair=0) + 7 * 2 * 2 * 32 * 16)
    assert record["flops_per_token"] == flops_of_embeddings(pair=6)
    rate = record["tokens_per_second_per_gpu"]
    assert record["mfu"] == pytest.approx(rate * flops_of_embeddings(pair=6) / record["gpu"]["flops"])
    config = tiny_run.configure(untied_file, *overrides)
    cluster = ClusterSpec(parse_architecture(config.model.architecture), GPUS["h100-80gb"], 1, Assumptions(1))
    rough = rough_prediction(config, plan_layout(config.parallel, 1), cluster)
    assert rough.computing == pytest.approx(record["step_seconds"]["computing"], rel=0.1)


def test_plan_counts_only_the_gradients_of_patterns(untied_file, tmp_path, one_pool):
    """Only the last block learns: of the first one, no gradients are computed, and only those of the input of the
    head. Attention is 2 products of causal pairs forward and 5 backward."""
    path, learning = tmp_path / "plan.json", ["--training.trainable", '["model.layers.1.*", "model.norm.*"]']
    command = ["--config", str(untied_file), "--gpus-per-node", "1", "--gpu", "h100-80gb", "--json", str(path)]
    plan([*command, "--training.precision", "bf16", *learning])
    record = json.loads(path.read_text())
    block, head = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48, 32 * (tiny_run.VOCAB_SIZE + 1)
    matrices = 2 * block + 6 * block + 4 * head
    assert record["ranks"][0]["flops"] == 8 * 32 * (matrices + (2 + 2 + 5) * 2 * 32 * 32 / 2)
    assert record["flops_per_token"] == matrices + (2 + 6) * 2 * 32 * 32


def test_changed_on_resume_is_refused(one_rank, untied_file, stage_one):
    line = tiny_run.refusal(one_rank, untied_file, ["--run_folder", str(stage_one)])
    assert "training.trainable is all" in line and "trained with embeddings" in line
    assert "model.initialize_from" in line and "\n" not in line


def test_stages_with_nothing_to_train_are_refused(four_ranks, untied_file, tmp_path):
    layout = ["--parallel.pipeline", "2", "--parallel.pipeline_schedule", "interleaved_1f1b"]
    layout += ["--parallel.pipeline_stages_per_rank", "2", "--training.micro_batch_size", "2"]
    config = yaml.safe_load(untied_file.read_text())
    config["model"]["architecture"]["num_hidden_layers"] = 4
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = four_ranks.run(tiny_run.refusal, path, ["--run_folder", str(tmp_path / "run"), *ONLY, *layout])
    assert all("training.trainable is embeddings" in line and "parallel.pipeline 2" in line for line in lines)


def test_plan_counts_no_states_for_what_is_frozen(untied_file, tmp_path, one_pool, capfd):
    """Two moments in fp32 of a rank's half of 2 x 98 x 32 weights, and a step count for each of the two: each in whole
    blocks of 512 bytes, as CUDA's allocator gives them."""
    found = tmp_path / "plan.json"
    plan(["--config", str(untied_file), "--gpus-per-node", "2", "--gpu", "h100-80gb", "--json", str(found), *ONLY])
    assert "optimizer states" in capfd.readouterr().out
    record = json.loads(found.read_text())
    ranks = record["ranks"]
    assert -(-49 * 32 * 4 // 512) * 512 == 6656
    assert [rank["kept_bytes"]["optimizer states"] for rank in ranks] == [4 * 6656 + 2 * 512] * len(ranks)
