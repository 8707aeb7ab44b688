"""Full training, Muon and LoRA of one tiny model: the same samples and the same first loss, and all of them learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run

METHODS = {
    "full": ["--optimizer.learning_rate", "1e-2"],
    "muon": ["--optimizer.name", "muon", "--optimizer.learning_rate", "1e-2"],
    "lora": ["--adapter.kind", "lora", "--adapter.rank", "4", "--optimizer.learning_rate", "3e-2"],
}


@pytest.fixture(scope="module")
def curves(one_rank, run_file, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of each method, of a run of 20 steps."""
    found = {}
    for method, options in METHODS.items():
        folder: Path = tmp_path_factory.mktemp(method) / "run"
        tiny_run.train(one_rank, run_file, ["--run_folder", str(folder), *options])
        found[method] = [record["loss"] for record in tiny_run.records(folder) if "grad_norm" in record]
    return found


def test_all_begin_with_the_same_model_and_samples(curves):
    assert {len(losses) for losses in curves.values()} == {20}
    assert curves["muon"][0] == curves["full"][0]
    assert curves["lora"][0] == pytest.approx(curves["full"][0], rel=1e-6)  # the product of an adapter is zero at first


def test_all_learn_each_in_its_own_way(curves):
    for losses in curves.values():
        assert sum(losses[-4:]) / 4 < losses[0] - 0.1
    lasts = [losses[-1] for losses in curves.values()]
    assert len(set(lasts)) == len(lasts)
    assert curves["lora"][-1] > curves["full"][-1]  # a random base, of which LoRA changes only the blocks
