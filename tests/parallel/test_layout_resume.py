"""A checkpoint of any layout goes on in any other, with the same losses, evaluations and weights."""

from __future__ import annotations

import functools

import parity_run
import pytest
import torch
from parity_run import STEPS, Model

LAYOUTS = {
    "one rank": (1, []),
    "shard 2": (2, []),
    "tensor 2": (2, ["--parallel.tensor", "2"]),
    "pipeline 2, interleaved": (
        2,
        [
            "--parallel.pipeline",
            "2",
            "--parallel.pipeline_schedule",
            "interleaved_1f1b",
            "--parallel.pipeline_stages_per_rank",
            "2",
        ],
    ),
    "pipeline 2 x tensor 2": (4, ["--parallel.pipeline", "2", "--parallel.tensor", "2"]),
    "tensor 2 x shard 2": (4, ["--parallel.tensor", "2"]),
    "context 2 x replicate 2": (4, ["--parallel.context", "2", "--parallel.replicate", "2"]),
    "context 2": (2, ["--parallel.context", "2"]),
    "context 2, ring": (2, ["--parallel.context", "2", "--parallel.context_kind", "ring"]),
}
EXPERT_LAYOUTS = {
    "expert 2": (2, ["--parallel.expert", "2"]),
    "expert 2 x shard 4": (4, ["--parallel.expert", "2"]),
    "tensor 2 x expert 2": (4, ["--parallel.expert", "2", "--parallel.tensor", "2"]),
}
LAYOUTS |= EXPERT_LAYOUTS
SAVED_AT, LEFT_AT = 3, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return parity_run.write_run(tmp_path_factory.mktemp("resume"), Model("qwen3", tied=True, packed=True))


@pytest.fixture(scope="module")
def path_of_experts(tmp_path_factory):
    return parity_run.write_run(tmp_path_factory.mktemp("experts"), Model("qwen2_moe", tied=True, packed=True))


@pytest.fixture
def on_ranks(one_rank, request):
    def run(layout, function, path, options, *arguments):
        world_size, overrides = LAYOUTS[layout]
        if world_size == 1:
            return function(one_rank, path, [*overrides, *options], *arguments)
        cluster = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
        return cluster.run(function, path, [*overrides, *options], *arguments)

    return run


@pytest.fixture(scope="module")
def undisturbed(one_rank, tmp_path_factory):
    """Gives the folder of a run of one rank with the YAML file ``path``, which is made once."""

    @functools.cache
    def run(path):
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        options = ["--run_folder", str(folder), "--data.validation", str({"same": str(path.parent / "data")})]
        parity_run.run_until(one_rank, path, options, STEPS)
        return folder

    return run


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("pipeline 2 x tensor 2", "shard 2"),
        pytest.param("context 2 x replicate 2", "pipeline 2 x tensor 2", marks=pytest.mark.slow),
        pytest.param("shard 2", "tensor 2 x shard 2", marks=pytest.mark.slow),
        pytest.param("context 2", "context 2, ring", marks=pytest.mark.slow),
        pytest.param("context 2, ring", "one rank", marks=pytest.mark.slow),
        pytest.param("tensor 2", "pipeline 2, interleaved", marks=pytest.mark.slow),
        pytest.param("pipeline 2, interleaved", "context 2 x replicate 2", marks=pytest.mark.slow),
        pytest.param("tensor 2 x shard 2", "one rank", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_in_another_layout(first, then, on_ranks, path, undisturbed, tmp_path):
    goes_on(first, then, on_ranks, path, undisturbed(path), tmp_path)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("expert 2 x shard 4", "tensor 2 x expert 2"),
        pytest.param("one rank", "expert 2", marks=pytest.mark.slow),
        pytest.param("expert 2", "one rank", marks=pytest.mark.slow),
        pytest.param("tensor 2 x expert 2", "expert 2", marks=pytest.mark.slow),
    ],
)
def test_shared_experts_go_on_in_another_layout(first, then, on_ranks, path_of_experts, undisturbed, tmp_path):
    goes_on(first, then, on_ranks, path_of_experts, undisturbed(path_of_experts), tmp_path)


def goes_on(first, then, on_ranks, path, undisturbed, tmp_path):
    """Compare a run that changes its layout with one of one rank that does not."""
    options = ["--run_folder", str(tmp_path), "--data.validation", str({"same": str(path.parent / "data")})]
    on_ranks(first, parity_run.run_until, path, options, LEFT_AT)
    saved = parity_run.checkpoint(tmp_path, SAVED_AT)
    on_ranks(then, parity_run.run_until, path, options, STEPS)
    for step, actual in ((SAVED_AT, saved), (STEPS, parity_run.checkpoint(tmp_path, STEPS))):
        expected = parity_run.checkpoint(undisturbed, step)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (actual[name] - tensor).norm() <= 1e-4 * tensor.norm(), f"{name} at step {step}"
    ours, theirs = parity_run.records(tmp_path), parity_run.records(undisturbed)
    assert [(r["step"], r.get("evaluation")) for r in ours] == [(r["step"], r.get("evaluation")) for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    assert sum("evaluation" in r for r in ours) == 1


def test_shared_experts_resume_bit_for_bit(on_ranks, path_of_experts, tmp_path):
    """The run is left in its fourth step, after a checkpoint of the third; ranks then start again."""
    folders = {"whole": [STEPS], "left": [LEFT_AT, STEPS]}
    for name, ends in folders.items():
        for end in ends:
            on_ranks("expert 2", parity_run.run_until, path_of_experts, ["--run_folder", str(tmp_path / name)], end)
    whole, resumed = (parity_run.checkpoint(tmp_path / name, STEPS) for name in folders)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_ring_attention_resumes_bit_for_bit(on_ranks, path, tmp_path):
    for name, stops in (("whole", [STEPS]), ("resumed", [LEFT_AT, STEPS])):
        options = ["--run_folder", str(tmp_path / name)]
        for step in stops:
            on_ranks("context 2, ring", parity_run.run_until, path, options, step)
    whole, resumed = (parity_run.checkpoint(tmp_path / name, STEPS) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
