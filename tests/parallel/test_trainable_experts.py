"""``training.trainable`` on a mixture of experts: the gradients of the whole run, and nothing else changes."""

from __future__ import annotations

import json

import mixture_folders
import pytest
import tiny_run
import torch
from test_trainable_patterns import present_gradients

EXPERTS = ["*mlp.experts*"]
BUT_ROUTER = ["*.self_attn.*", "*.mlp.experts.*", "*.mlp.shared_expert.*", "*norm*", "*_gate.weight"]
STEPS = 6
CASES = {
    "experts": (json.dumps(EXPERTS), lambda name: ".experts." in name),
    "routers": (json.dumps(["*mlp.gate.weight"]), lambda name: name.endswith("mlp.gate.weight")),
    "all but routers": (json.dumps(BUT_ROUTER), lambda name: not name.endswith(("gate.weight", "tokens.weight"))),
    "embeddings": ("embeddings", lambda name: name == "model.embed_tokens.weight"),
}


def options(selection: str, folder) -> list[str]:
    budget = ["--training.train_tokens", str(STEPS * 8 * 32), "--training.eval_interval", "0"]
    mixture = mixture_folders.architecture_options("qwen2_moe")
    return [*mixture, *budget, "--training.trainable", selection, "--run_folder", str(folder)]


@pytest.fixture(scope="module")
def all_gradients(one_rank, run_file, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Those of a model that learns as a whole."""
    return present_gradients(one_rank, run_file, options("all", tmp_path_factory.mktemp("whole")))


def assert_gradients(found, all_gradients, case):
    chosen = {name for name in all_gradients if CASES[case][1](name) or (case[:3] == "all" and "shared" in name)}
    assert found.keys() == chosen and 0 < len(chosen) < len(all_gradients)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, all_gradients[name], rtol=1e-4, atol=1e-7)
        assert gradient.any()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_run(case, one_rank, run_file, all_gradients, tmp_path):
    found = present_gradients(one_rank, run_file, options(CASES[case][0], tmp_path))
    assert_gradients(found, all_gradients, case)


def test_two_ranks_give_the_same_gradients(two_ranks, run_file, all_gradients, tmp_path):
    for part in two_ranks.run(present_gradients, run_file, options(CASES["experts"][0], tmp_path)):
        assert_gradients(part, all_gradients, "experts")


def test_a_run_of_the_experts_changes_nothing_else_and_resumes_bitwise(one_rank, run_file, tmp_path):
    """Its checkpoints have states of the experts only."""
    first, again = (options(CASES["experts"][0], tmp_path / name) for name in ("first", "again"))
    tiny_run.train(one_rank, run_file, first)
    tiny_run.train_until(one_rank, run_file, again, 5)
    tiny_run.train(one_rank, run_file, again)
    end, other, start = (
        tiny_run.tensors_of(tmp_path / folder / "checkpoints" / f"step-{step:08d}")
        for folder, step in (("first", STEPS), ("again", STEPS), ("first", 4))
    )
    assert end.keys() == other.keys() and all(torch.equal(end[name], other[name]) for name in end)
    for name, tensor in end.items():
        if not name.startswith("optimizer."):
            assert torch.equal(tensor, start[name]) == (".experts." not in name), name
        else:
            assert ".experts." in name
