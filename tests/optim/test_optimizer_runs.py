"""Whole runs with each optimizer: the same curve on every layout, bitwise resumes, and checkpoints that reshard."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.engine.observe.start_summary import describe_start
from retemper.engine.weights.checkpoint.destination import checkpoint_bytes
from retemper.engine.weights.checkpoint.tensors import training_tensors

STEPS = 8
SHORT = [
    "--training.train_tokens",
    str(STEPS * 8 * 32),
    "--training.eval_interval",
    "0",
    "--training.eval_tokens",
    "32",
]
SHORT += ["--training.micro_batch_size", "2"]
OPTIONS = {
    "muon": ["--optimizer.name", "muon"],
    "lion": ["--optimizer.name", "lion", "--optimizer.learning_rate", "1e-3", "--optimizer.min_learning_rate", "1e-4"],
    "adamw_8bit": ["--optimizer.name", "adamw_8bit", "--model.architecture.intermediate_size", "512"],
    "child": ["--optimizer.child_tuning", "0.3"],
}
ADAMW = {"step", "exp_avg", "exp_avg_sq"}
STATES = {
    "muon": {*ADAMW, "momentum_buffer"},
    "lion": {"step", "exp_avg"},
    "adamw_8bit": {*ADAMW, "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"},
}


def options_of(name: str, folder: Path) -> list[str]:
    return [*SHORT, *OPTIONS[name], "--run_folder", str(folder)]


@pytest.fixture(scope="module")
def even_file(run_file, tmp_path_factory) -> Path:
    """The tiny run with a head of its own and a vocabulary that two ranks can share."""
    config = yaml.safe_load(run_file.read_text())
    config["model"]["architecture"] |= {"tie_word_embeddings": False, "vocab_size": tiny_run.VOCAB_SIZE + 1}
    path = tmp_path_factory.mktemp("even") / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=list(OPTIONS))
def undisturbed(request, one_rank, even_file, tmp_path_factory) -> tuple[str, Path]:
    """Name of an optimizer, and the run folder of one rank that trained with it."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    tiny_run.train(one_rank, even_file, options_of(request.param, folder))
    return request.param, folder


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return tiny_run.tensors_of(folder / "checkpoints" / f"step-{STEPS:08d}")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_it_learns_and_its_states_are_plain_tensors(undisturbed):
    name, folder = undisturbed
    losses = [r["loss"] for r in tiny_run.records(folder) if "grad_norm" in r]
    assert losses[-1] < losses[0] - 0.05
    if name in STATES:
        found = {key.split(".")[1] for key in last_tensors(folder) if key.startswith("optimizer.")}
        assert found == STATES[name]


def test_resumed_bitwise(undisturbed, one_rank, even_file, tmp_path):
    name, folder = undisturbed
    overrides = options_of(name, tmp_path)
    tiny_run.train_until(one_rank, even_file, overrides, 6)  # saved at step 4
    tiny_run.train(one_rank, even_file, overrides)
    assert tiny_run.curve(tmp_path) == tiny_run.curve(folder)
    assert_same(last_tensors(tmp_path), last_tensors(folder))


@pytest.mark.parametrize("layout", [[], ["--parallel.tensor", "2"], ["--parallel.pipeline", "2"]], ids=str)
def test_two_ranks_give_the_same_curve(undisturbed, two_ranks, even_file, tmp_path, layout):
    name, folder = undisturbed
    overrides = [*options_of(name, tmp_path), *layout, "--checkpoint.save_interval", "1000"]
    two_ranks.run(tiny_run.train, even_file, overrides)
    for one, other in zip(tiny_run.curve(tmp_path), tiny_run.curve(folder), strict=True):
        assert one[:2] == other[:2] and one[2:] == pytest.approx(other[2:], rel=2e-5)


def loaded(ranks, even_file: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """All tensors of a run that has loaded its checkpoint, whole."""
    run = pretrain.build(tiny_run.configure(even_file, *overrides), ranks)
    tensors = training_tensors(run.model, run.optimizer)
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


@pytest.mark.parametrize(
    "layout",
    [["--parallel.replicate", "2", "--parallel.shard", "2"], ["--parallel.tensor", "2"]],
    ids=str,
)
def test_states_reshard_bitwise_and_four_ranks_continue(undisturbed, four_ranks, even_file, tmp_path, layout):
    """A tensor-parallel matrix is sharded twice; replicas are compared bit for bit while the run continues."""
    name, folder = undisturbed
    tiny_run.copy_of(folder, tmp_path / "run")
    overrides = [*options_of(name, tmp_path / "run"), *layout]
    for tensors in four_ranks.run(loaded, even_file, overrides):
        assert_same(tensors, last_tensors(folder))
    more = ["--training.train_tokens", str((STEPS + 2) * 8 * 32), "--training.check_replicas_interval", "1"]
    four_ranks.run(tiny_run.train, even_file, [*overrides, *more])
    assert [r["step"] for r in tiny_run.records(tmp_path / "run") if "grad_norm" in r][-1] == STEPS + 2


def test_another_optimizer_is_refused_on_resume(undisturbed, one_rank, even_file):
    name, folder = undisturbed
    other = [*options_of(name, folder), "--optimizer.name", "lion" if name != "lion" else "adamw"]
    line = tiny_run.refusal(one_rank, even_file, other)
    assert "optimizer.name is" in line and "set it back" in line and "\n" not in line


def test_the_size_of_a_checkpoint_is_known(undisturbed, one_rank, even_file):
    name, folder = undisturbed
    config = tiny_run.configure(even_file, *options_of(name, folder))
    run = pretrain.build(config, one_rank)
    tensors = last_tensors(folder)
    size = sum(t.numel() * t.element_size() for n, t in tensors.items() if not n.startswith("optimizer.step."))
    assert checkpoint_bytes(config, run.start.architecture) == size
    [line] = [line for line in describe_start(run) if line.startswith("optimizer ")]
    assert ("muon for 14 parameters" in line) == (name == "muon")
    assert ("8-bit states of 2 parameters with 32,768 elements" in line) == (name == "adamw_8bit")
