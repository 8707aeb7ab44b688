"""Runs of models that transformers computes: stopped, resumed on another number of ranks, checked and exported."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from model_table import tiny_config

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.parallel.process_group import Ranks

TYPES = ("deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm4_moe", "qwen3_next")))
"""The first two have constants; the last one computes one document at a time."""
LAST = "checkpoints/step-00000006"
SHORT = ("--training.train_tokens", "1536", "--training.eval_interval", "3", "--checkpoint.save_interval", "3")
"""Six steps."""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """The YAML file of a type's run, which starts from random weights."""

    @functools.cache
    def write(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        path = tiny_run.write_config(folder)
        tiny_config(model_type).save_pretrained(folder)
        content = yaml.safe_load(path.read_text())
        content["model"] = {"architecture": str(folder), "implementation": "transformers"}
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="module")
def finished(one_rank, run_file, tmp_path_factory):
    """Run folder of a type's run on one rank."""

    @functools.cache
    def train(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{model_type}_run") / "run"
        tiny_run.train(one_rank, run_file(model_type), [*SHORT, "--run_folder", str(folder)])
        return folder

    return train


def require_same(one: Path, other: Path) -> None:
    mine, theirs = (tiny_run.tensors_of(run / LAST) for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert tiny_run.curve(one) == tiny_run.curve(other)


def different_constants(run: Path, other: Path) -> list[str]:
    """Names of those that differ in the last checkpoints of two runs."""
    mine, theirs = (tiny_run.tensors_of(folder / LAST) for folder in (run, other))
    names = {name for name in mine if name.endswith("e_score_correction_bias")}
    assert all(mine[name].dtype == torch.float32 for name in names)
    assert not any(name.startswith("optimizer.") for name in names)
    return [name for name in names if not torch.equal(mine[name], theirs[name])]


def require_close(one: Path, other: Path) -> None:
    for mine, theirs in zip(tiny_run.curve(one), tiny_run.curve(other), strict=True):
        assert mine[:2] == theirs[:2] and mine[2:] == pytest.approx(theirs[2:], rel=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_resumed_bitwise(model_type, one_rank, run_file, finished, tmp_path):
    overrides = [*SHORT, "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, run_file(model_type), overrides, 4)
    tiny_run.train(one_rank, run_file(model_type), overrides)
    require_same(tmp_path, finished(model_type))


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("model_type", TYPES)
def test_resumed_on_another_number_of_ranks(model_type, first, one_rank, two_ranks, run_file, finished, tmp_path):
    """The curve has the norm of all gradients before clipping."""
    path, overrides = run_file(model_type), [*SHORT, "--run_folder", str(tmp_path)]
    if first == 1:
        tiny_run.train_until(one_rank, path, overrides, 4)
        two_ranks.run(tiny_run.train, path, overrides)
    else:
        two_ranks.run(tiny_run.train_until, path, overrides, 4)
        tiny_run.train(one_rank, path, overrides)
    require_close(tmp_path, finished(model_type))
    assert not different_constants(tmp_path, finished(model_type))


@pytest.mark.parametrize("model_type", TYPES)
def test_replicas_stay_equal(model_type, two_ranks, run_file, finished, tmp_path):
    check = ["--parallel.replicate", "2", "--training.check_replicas_interval", "1"]
    two_ranks.run(tiny_run.train, run_file(model_type), [*SHORT, *check, "--run_folder", str(tmp_path)])
    require_close(tmp_path, finished(model_type))


def damage_constant(ranks: Ranks, path: Path, overrides: list[str]) -> str:
    """What a run says whose second rank has another value in a constant from its third step on."""
    run = pretrain.build(tiny_run.configure(path, *overrides), ranks)

    def damage() -> None:
        name = next(name for name, _ in run.model.named_parameters() if name.endswith("e_score_correction_bias"))
        if run.progress.step == 2 and ranks.rank == 1:
            dict(run.model.named_parameters())[name].data[0] += 1e-6

    tiny_run.before_step(run, damage)
    with pytest.raises(UserError) as caught:
        pretrain.train(run)
    return str(caught.value)


@pytest.mark.parametrize("axis", ["replicate", "shard"])
def test_damaged_constant_is_named(axis, two_ranks, run_file, tmp_path):
    check = [f"--parallel.{axis}", "2", "--training.check_replicas_interval", "1", "--run_folder", str(tmp_path)]
    lines = two_ranks.run(damage_constant, run_file("glm4_moe"), [*SHORT, *check])
    assert all("step 3" in line and "e_score_correction_bias" in line for line in lines)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next", "gpt2"])
def test_export_is_the_trained_model(model_type, two_ranks, run_file, tmp_path):
    """In bf16 weights, of which constants are not."""
    from transformers import AutoModelForCausalLM

    overrides = [
        *SHORT,
        "--run_folder",
        str(tmp_path),
        "--training.weight_dtype",
        "bf16",
        "--checkpoint.export_hf",
        "true",
    ]
    two_ranks.run(tiny_run.train, run_file(model_type), overrides)
    loaded, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf" / "step-00000006", dtype=torch.float32, output_loading_info=True
    )
    assert not any(problems.values()), problems
    trained, exported = tiny_run.tensors_of(tmp_path / LAST), loaded.state_dict()
    names = [name for name in trained if not name.startswith("optimizer.")]
    assert [name for name in names if not torch.equal(trained[name].float(), exported[name])] == []


def test_parameters_without_gradients_stay_as_they_are(one_rank, run_file, tmp_path):
    """Their optimizer states are stored as zeros."""
    path, overrides = run_file("deepseek_v32"), [*SHORT, "--run_folder", str(tmp_path)]
    tiny_run.train_until(one_rank, path, overrides, 4)
    tiny_run.train(one_rank, path, overrides)
    first, last = (tiny_run.tensors_of(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (3, 6))
    names = [name for name in first if ".indexer." in name]
    assert names and all(torch.equal(first[name], last[name]) for name in names)
    states = [name for name in names if name.startswith("optimizer.")]
    assert len(states) == 3 * sum(not name.startswith("optimizer.") for name in names)
    assert not any(last[name].any() for name in states)


def test_samples_longer_than_the_table_of_positions_are_refused(one_rank, run_file, tmp_path):
    options = [*SHORT, "--run_folder", str(tmp_path / "run"), "--model.dropout", "0"]
    config = tiny_run.configure(run_file("gpt2"), *options, "--training.sequence_length", "256")
    with pytest.raises(UserError, match=r"training\.sequence_length 256 .* 128 positions; set it to 128"):
        pretrain.build(config, one_rank)
