"""Adapters of experts that ranks share: the numbers of one process with expert, tensor and data parallelism."""

from __future__ import annotations

from dataclasses import replace

import parity_run
import pytest

from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.model.implementations import architecture_of
from retemper.engine.parallel import adapter

LORA = ["--adapter.kind", "lora", "--adapter.rank", "4", "--adapter.alpha", "12"]
COMMON = ["--optimizer.learning_rate", "0.01", "--training.micro_batch_size", "2"]


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory):
    return parity_run.write_run(tmp_path_factory.mktemp("run"), parity_run.Model("qwen2_moe", tied=False, packed=True))


@pytest.fixture(scope="module")
def one_process(one_rank, run_yaml):
    return parity_run.five_steps(one_rank, run_yaml, [*LORA, *COMMON])


def assert_same(actual, expected):
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    for ours, theirs in ((actual.gradients, expected.gradients), (actual.parameters, expected.parameters)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def options(layout: str) -> list[str]:
    pairs = (setting.split("=") for setting in layout.split())
    return [*LORA, *COMMON, *(word for axis, size in pairs for word in (f"--parallel.{axis}", size))]


@pytest.mark.parametrize("layout", ["shard=2 expert=2", "tensor=2", "pipeline=2"])
def test_two_ranks_give_the_numbers_of_one(layout, one_process, two_ranks, run_yaml):
    found = two_ranks.run(parity_run.five_steps, run_yaml, options(layout))
    assert_same(parity_run.joined(found), one_process)


@pytest.mark.parametrize(
    "layout", ["shard=2 expert=2 tensor=2", pytest.param("shard=4 expert=2", marks=pytest.mark.slow)]
)
def test_four_ranks_give_the_numbers_of_one(layout, one_process, four_ranks, run_yaml):
    found = four_ranks.run(parity_run.five_steps, run_yaml, options(layout))
    assert_same(parity_run.joined(found), one_process)


def test_dropout_of_experts_on_other_ranks_is_refused_in_one_line(run_yaml):
    more = [*options("shard=2 expert=2"), "--adapter.dropout", "0.1"]
    config = parse_config(["--config", str(run_yaml), *more])
    architecture = architecture_of(config.model.architecture)
    with pytest.raises(UserError, match=r"^adapter.dropout is 0.1, but parallel.expert is 2[^\n]*$"):
        adapter.check(architecture, config, 2)
    adapter.check(architecture, replace(config, adapter=replace(config.adapter, targets=["*.self_attn.*"])), 2)
