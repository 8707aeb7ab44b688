"""Adapters on several ranks, in recomputation and in compiled blocks: the numbers of one process."""

from __future__ import annotations

import functools

import parity_run
import pytest
import torch
from parity_run import Model

from retemper.engine.parallel import compile as block_compile

MODEL = Model("qwen3", tied=True, packed=True)
BIASED = Model("qwen2", tied=False, packed=True)
LORA = "kind=lora rank=4 alpha=8 targets=['*_proj']"
PLAIN = f"{LORA} dropout=0.25"
DORA = f"{LORA} dropout=0.25 dora=true modules_to_save=['model.embed_tokens','*norm*']"
ADAPTERS = {"lora": (PLAIN, BIASED), "dora": (DORA, MODEL)}


def options_of(adapter: str, layout: str = "") -> list[str]:
    """ "rank=4" as an option of the adapter, "shard=2" as one of the layout."""
    options = ["--optimizer.learning_rate", "0.01", "--training.micro_batch_size", "4"]
    for section, settings in (("adapter", adapter), ("parallel", layout)):
        for setting in settings.split():
            key, value = setting.split("=", 1)
            place = "training" if key in ("compile", "micro_batch_size") else section
            options += [f"--{place}.{key}", value]
    return options


@pytest.fixture(scope="module")
def reference(one_rank, tmp_path_factory):
    """Gives the YAML file of the run with an adapter, and what one process does with it."""
    known = {}

    def get(name: str):
        if name not in known:
            adapter, model = ADAPTERS[name]
            path = parity_run.write_run(tmp_path_factory.mktemp("adapter"), model)
            known[name] = path, parity_run.five_steps(one_rank, path, options_of(adapter))
        return known[name]

    return get


def assert_same(actual, expected):
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for ours, theirs in ((actual.gradients, expected.gradients), (actual.parameters, expected.parameters)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("adapter", "layout"),
    [
        ("dora", "shard=2"),
        ("dora", "tensor=2"),
        ("dora", "context=2"),
        ("dora", "pipeline=2"),
        ("lora", "tensor=2"),
        pytest.param("lora", "replicate=2 reduce_gradients=step", marks=SLOW),
        pytest.param("lora", "pipeline=2", marks=SLOW),
        pytest.param("lora", "tensor=2 recompute=selective", marks=SLOW),
        pytest.param("dora", "replicate=2", marks=SLOW),
        pytest.param("dora", "shard=2 cpu_offload=true", marks=SLOW),
    ],
)
def test_two_ranks_give_the_numbers_of_one(adapter, layout, two_ranks, reference):
    path, expected = reference(adapter)
    options = options_of(ADAPTERS[adapter][0], layout)
    assert_same(parity_run.joined(two_ranks.run(parity_run.five_steps, path, options)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor=2 shard=2", "context=2 tensor=2", "pipeline=2 shard=2 micro_batch_size=1"])
def test_four_ranks_give_the_numbers_of_one(layout, four_ranks, reference):
    path, expected = reference("dora")
    assert_same(parity_run.joined(four_ranks.run(parity_run.five_steps, path, options_of(DORA, layout))), expected)


@pytest.mark.slow
def test_compiled_blocks_give_the_numbers_of_others(one_rank, reference, monkeypatch):
    """With the graphs of torch.compile, but without Inductor's kernels."""
    apply = functools.partial(block_compile.apply, backend="aot_eager")
    monkeypatch.setattr(block_compile, "apply", apply)
    path, expected = reference("dora")
    assert_same(parity_run.five_steps(one_rank, path, options_of(DORA, "compile=on")), expected)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_is_bitwise_the_same(recompute, one_rank, reference):
    """Also where dropout is: the mask is a function of the token."""
    path, expected = reference("dora")
    actual = parity_run.five_steps(one_rank, path, options_of(DORA, f"recompute={recompute}"))
    assert actual.losses == expected.losses and actual.grad_norms == expected.grad_norms
    assert all(torch.equal(actual.parameters[name], value) for name, value in expected.parameters.items())
