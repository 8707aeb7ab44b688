"""``training.trainable`` with patterns: gradients, layouts, resume, costs and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml

from retemper.engine import pretrain
from retemper.engine.config.settings import TrainingConfig
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.observe.start_summary import describe_model
from retemper.engine.parallel import trainable
from retemper.engine.parallel.fsdp import _first_with_backward
from retemper.engine.weights.checkpoint.tensors import stored_tensors

LAST = ["model.layers.1.*", "model.norm.weight"]
"""The embedding and the first block are frozen, so no gradient flows there."""
SCATTERED = ["*norm*", "*.down_proj.*", "*.k_proj.bias"]
STEPS = 10
BUDGET = ["--training.train_tokens", str(STEPS * 8 * 32)]


def training(patterns: list[str]) -> list[str]:
    return ["--training.trainable", json.dumps(patterns)]


@pytest.fixture(scope="module")
def untied_file(run_file, tmp_path_factory) -> Path:
    """The tiny run with a head of its own and a vocabulary that two ranks can share."""
    config = yaml.safe_load(run_file.read_text())
    config["model"]["architecture"] |= {"tie_word_embeddings": False, "vocab_size": tiny_run.VOCAB_SIZE + 1}
    path = tmp_path_factory.mktemp("untied") / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def present_gradients(ranks, path: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Full gradients of the first global batch, of the parameters that have one."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    batches = run.data.micro_batches(0)
    num_targets = ranks.all_reduce(tiny_run.count_targets(batches, run.mesh))
    run.forward_backward.accumulate_gradients(batches, num_targets, lambda phase: None)
    return {name: tiny_run.whole(p.grad) for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def all_gradients(one_rank, untied_file, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Those of a model that learns as a whole, on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    return present_gradients(one_rank, untied_file, ["--run_folder", str(folder)])


def chosen(names, patterns) -> set[str]:
    """The names that the two lists above select, by hand."""
    if patterns is LAST:
        return {name for name in names if name.startswith("model.layers.1.") or name == "model.norm.weight"}
    return {name for name in names if "norm" in name or ".down_proj." in name or name.endswith("k_proj.bias")}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("patterns", [LAST, SCATTERED], ids=["last", "scattered"])
def test_gradients_are_those_of_the_whole_run(one_rank, untied_file, all_gradients, tmp_path, patterns, recompute):
    options = ["--run_folder", str(tmp_path), "--parallel.recompute", recompute, *training(patterns)]
    some = present_gradients(one_rank, untied_file, options)
    assert some.keys() == chosen(all_gradients, patterns) and 0 < len(some) < len(all_gradients)
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, all_gradients[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("patterns", "layout"),
    [
        (LAST, []),
        (LAST, ["--parallel.reshard_after_forward", "false", "--parallel.recompute", "full"]),
        (SCATTERED, ["--parallel.tensor", "2"]),
        (LAST, ["--parallel.context", "2"]),
        (SCATTERED, ["--parallel.pipeline", "2"]),
    ],
    ids=["shard", "recompute", "tensor", "context", "pipeline"],
)
def test_two_ranks_give_the_same_gradients(two_ranks, untied_file, all_gradients, tmp_path, patterns, layout):
    options = ["--run_folder", str(tmp_path), *training(patterns), *layout]
    parts = two_ranks.run(present_gradients, untied_file, options)
    assert set().union(*parts) == chosen(all_gradients, patterns)
    for part in parts:
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, all_gradients[name], rtol=1e-4, atol=1e-7)


def test_frozen_tied_embedding_at_both_ends_of_a_pipeline(one_rank, two_ranks, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path), *training(SCATTERED)]
    expected = present_gradients(one_rank, run_file, options)
    parts = two_ranks.run(present_gradients, run_file, [*options, "--parallel.pipeline", "2"])
    assert set().union(*parts) == expected.keys() and "model.embed_tokens.weight" not in expected
    for part in parts:
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_frozen_blocks_are_not_gathered_for_the_backward_pass(one_rank, untied_file, tmp_path):
    for patterns, first in ((LAST, 1), (SCATTERED, 0), (["lm_head.weight"], 2)):
        run = pretrain.build(
            tiny_run.configure(untied_file, "--run_folder", str(tmp_path), *training(patterns)), one_rank
        )
        assert _first_with_backward(run.model.decoders[0]) == first


@pytest.fixture(scope="module")
def undisturbed(one_rank, untied_file, tmp_path_factory) -> Path:
    """Run folder of a run of the last block."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny_run.train(one_rank, untied_file, ["--run_folder", str(folder), *training(LAST), *BUDGET])
    return folder


def test_frozen_weights_stay_and_have_no_states(one_rank, untied_file, undisturbed, tmp_path):
    run = pretrain.build(tiny_run.configure(untied_file, "--run_folder", str(tmp_path), *training(LAST)), one_rank)
    before = {name: tiny_run.whole(parameter) for name, parameter in run.model.named_parameters()}
    learns = chosen(before, LAST)
    last = sorted((undisturbed / "checkpoints").iterdir())[-1]
    after = tiny_run.tensors_of(last)
    assert {name for name in before if not torch.equal(after[name], before[name])} == learns
    states = {name for name in stored_tensors(last) if name.startswith("optimizer.exp_avg.")}
    assert states == {f"optimizer.exp_avg.{name}" for name in learns}
    number = sum(before[name].numel() for name in learns)
    total = sum(weight.numel() for weight in before.values())
    (line,) = (line for line in describe_model(run) if line.startswith("trainable "))
    assert f"{len(learns)} of {len(before)} tensors with {number:,} parameters learn" in line
    assert f"{total - number:,} parameters are frozen" in line


def test_resumed_bitwise_with_another_spelling_of_the_same(one_rank, untied_file, undisturbed, tmp_path):
    options = ["--run_folder", str(tmp_path), *BUDGET]
    tiny_run.train_until(one_rank, untied_file, [*options, *training(LAST)], 6)
    tiny_run.train(one_rank, untied_file, [*options, *training(["model.norm.*", "model.layers.[1-9].*"])])
    assert tiny_run.curve(tmp_path) == tiny_run.curve(undisturbed)
    mine, theirs = (tiny_run.tensors_of(run / "checkpoints" / f"step-{STEPS:08d}") for run in (tmp_path, undisturbed))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_other_parameters_on_resume_are_refused(one_rank, untied_file, undisturbed):
    line = tiny_run.refusal(one_rank, untied_file, ["--run_folder", str(undisturbed), *training(SCATTERED)])
    assert str(SCATTERED) in line and str(LAST) in line and "\n" not in line


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["model.layers.1.*", "model.layer.0.*"], ["'model.layer.0.*'", "none of the model's 27", "'layers'"]),
        (["norm"], ["'norm'", "* matches any text"]),
        (["model.layers.0.mlp.up_proj.wieght"], ["did you mean 'model.layers.0.mlp.up_proj.weight'"]),
        (["model.layers.7.*"], ["'model.layers.7.*'"]),
    ],
)
def test_patterns_without_match_are_refused(one_rank, untied_file, tmp_path, patterns, words):
    line = tiny_run.refusal(one_rank, untied_file, ["--run_folder", str(tmp_path), *training(patterns)])
    assert line.startswith("training.trainable has ") and all(word in line for word in words) and "\n" not in line


def test_head_that_is_the_embedding_is_named(one_rank, run_file, tmp_path):
    line = tiny_run.refusal(one_rank, run_file, ["--run_folder", str(tmp_path), *training(["lm_head.*"])])
    assert "the head is the embedding; write 'model.embed_tokens.weight'" in line


def test_stage_without_trainable_parameters_is_refused(two_ranks, untied_file, tmp_path):
    options = ["--run_folder", str(tmp_path), "--parallel.pipeline", "2", *training(LAST)]
    for line in two_ranks.run(tiny_run.refusal, untied_file, options):
        assert "training.trainable is" in line and "stage 0 (layers 0 to 0)" in line


def test_zero_bubble_is_refused(two_ranks, untied_file, tmp_path):
    config = yaml.safe_load(untied_file.read_text())
    config["model"]["architecture"]["num_hidden_layers"] = 4
    config["parallel"] = {
        "pipeline": 2,
        "pipeline_schedule": "zbv_zero_bubble",
        "pipeline_stages_per_rank": 2,
        "reshard_after_forward": False,
    }
    config["training"] |= {"micro_batch_size": 1, "trainable": SCATTERED}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    for line in two_ranks.run(tiny_run.refusal, path, ["--run_folder", str(tmp_path / "run")]):
        assert "training.trainable is" in line and "use 1f1b or interleaved_1f1b" in line


def test_projections_of_which_only_some_learn_are_not_fused(one_rank, untied_file, tmp_path):
    options = ["--run_folder", str(tmp_path), "--training.fuse_projections", "true"]
    line = tiny_run.refusal(one_rank, untied_file, [*options, *training(["*.q_proj.*"])])
    assert "q_proj.weight, model.layers.0.self_attn.k_proj.weight" in line and "fuse_projections to false" in line
    present_gradients(one_rank, untied_file, [*options, *training(LAST)])


def test_depth_is_extrapolated_only_if_all_blocks_train_the_same():
    shape = parse_architecture({**tiny_run.ARCHITECTURE, "num_hidden_layers": 12})
    same = {"all": True, "embeddings": True, "*norm*": True, "model.layers.1[01].*": False, "*.1.*": False}
    for selection, expected in same.items():
        value = selection if selection.isalpha() else [selection]
        assert trainable.is_same_in_every_block(shape, TrainingConfig(1, trainable=value)) == expected, selection
