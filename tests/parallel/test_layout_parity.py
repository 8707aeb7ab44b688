"""Every layout computes the numbers of one process: losses, every gradient, every parameter after five steps.

The single process is itself compared with transformers in tests/system/test_whole_runs.py and tests/model.
"""

from __future__ import annotations

import parity_run
import pytest
import torch
from parity_run import Model

PACKED = Model("qwen2", tied=True, packed=True)
WHOLE = Model("llama", tied=False, packed=False)
NORMED = Model("qwen3", tied=False, packed=True)
# The other families; first those with an option that a layout treats in its own way.
OPTIONS = tuple(
    Model(family, tied=family in ("gemma2", "smollm3", "cohere2"), packed=True)
    for family in (
        *("olmo2", "gpt_neox", "gemma2", "cohere2", "granite", "phi3", "starcoder2", "olmo3", "smollm3"),
        *("gemma3_text", "seed_oss", "ministral3", "glm4", "stablelm"),
    )
)
EXPERTS = Model("qwen3_moe", tied=False, packed=True)
SHARED_EXPERT = Model("qwen2_moe", tied=False, packed=True)

GEMMA = OPTIONS[2]  # windows and soft caps

RING = "context_kind=ring"
INTERLEAVED = "pipeline_schedule=interleaved_1f1b pipeline_stages_per_rank=2"
ZERO_BUBBLE = "pipeline_stages_per_rank=2 reshard_after_forward=false pipeline_schedule="
Case = tuple[int, str, tuple[Model, ...]]
CASES: list[Case] = [
    (1, "recompute=full", (PACKED, NORMED)),
    (1, "micro_batch_size=4", (WHOLE,)),
    (2, "shard=2", (PACKED, WHOLE, NORMED)),
    (2, "shard=2 cpu_offload=true", (PACKED,)),
    (2, "shard=2 reduce_gradients=step", (NORMED,)),
    (4, "replicate=2 shard=2", (WHOLE, NORMED)),
    (2, "tensor=2", (PACKED, WHOLE, NORMED)),
    (2, "pipeline=2", (PACKED, WHOLE, NORMED)),
    (2, f"pipeline=2 {ZERO_BUBBLE}zbv_zero_bubble", (NORMED,)),
    (2, "context=2", (PACKED, WHOLE, NORMED)),
    (2, f"context=2 {RING}", (PACKED, GEMMA)),
    (4, "tensor=2 shard=2", (NORMED, PACKED)),
    (2, "tensor=2", OPTIONS),
    (2, "pipeline=2", OPTIONS[2:] + OPTIONS[:2]),
    (2, "shard=2", OPTIONS),
    (1, "recompute=full", (EXPERTS,)),
    (2, "shard=2", (EXPERTS, SHARED_EXPERT)),
    (2, "tensor=2", (EXPERTS, SHARED_EXPERT)),
    (2, "pipeline=2", (EXPERTS,)),
    (2, "expert=2", (EXPERTS, SHARED_EXPERT)),
    (4, "tensor=2 expert=2", (SHARED_EXPERT, EXPERTS)),
]
"""Every axis, each kind of model. With the first model for every run of the tests."""
if torch.__version__ < "2.13":  # refused with gloo
    CASES = [case for case in CASES if "zbv_zero_bubble" not in case[1]]
MORE_CASES: list[Case] = [
    (2, "replicate=2", (PACKED,)),
    (2, "tensor=2 recompute=full", (NORMED,)),
    (2, f"pipeline=2 {INTERLEAVED}", (PACKED,)),
    (4, "pipeline=2 tensor=2", (PACKED, NORMED)),
    (4, "context=2 shard=2", (PACKED, NORMED)),
    (1, "recompute=selective", (WHOLE,)),
    (1, "micro_batch_size=2", (PACKED,)),
    (2, "shard=2 reshard_after_forward=false", (NORMED,)),
    (2, "shard=2 reduce_gradients=step micro_batch_size=2", (WHOLE,)),
    (2, "shard=2 micro_batch_size=4", (PACKED,)),
    (4, "shard=4", (PACKED,)),
    (2, "tensor=2 recompute=selective", (PACKED,)),
    (4, "tensor=2 replicate=2", (WHOLE,)),
    (2, "pipeline=2 recompute=full", (PACKED,)),
    (2, f"pipeline=2 {ZERO_BUBBLE}interleaved_zero_bubble", (PACKED,)),
    (4, "pipeline=4", (PACKED,)),
    (4, "pipeline=2 shard=2", (PACKED, WHOLE)),
    (4, "pipeline=2 replicate=2 reduce_gradients=step", (WHOLE,)),
    (2, "context=2 recompute=selective", (NORMED,)),
    (4, "context=4", (PACKED,)),  # more ranks than key/value heads
    (4, "context=2 tensor=2", (PACKED,)),
    (4, "pipeline=2 context=2", (WHOLE,)),
    (2, f"context=2 {RING}", (WHOLE, NORMED)),
    (2, f"context=2 {RING} micro_batch_size=4", (PACKED,)),
    (2, f"context=2 {RING} recompute=full", (PACKED,)),
    (2, f"context=2 {RING} recompute=selective", (NORMED,)),
    (4, f"context=4 {RING}", (PACKED, WHOLE, GEMMA)),
    (4, f"context=2 shard=2 {RING}", (NORMED,)),
    (4, f"context=2 tensor=2 {RING}", (PACKED, GEMMA)),
    (4, f"pipeline=2 context=2 {RING}", (PACKED,)),
    (2, "tensor=2 compile=on", (NORMED,)),
    (2, "pipeline=2 compile=on", (PACKED,)),
    (4, "tensor=2 shard=2", OPTIONS[:3]),
    (2, "tensor=2 recompute=selective", OPTIONS[:2]),
    (4, "context=2 tensor=2", OPTIONS[:3]),
    (1, "recompute=full", OPTIONS[1:4]),
    (1, "micro_batch_size=4", (EXPERTS,)),
    (2, "expert=2 recompute=full", (EXPERTS, SHARED_EXPERT)),
    (2, "expert=2 recompute=selective", (EXPERTS, SHARED_EXPERT)),
    (2, "expert=2 micro_batch_size=4", (EXPERTS,)),
    (2, "expert=2 reduce_gradients=step", (SHARED_EXPERT,)),
    (2, "expert=2 cpu_offload=true", (EXPERTS,)),
    (2, "expert=2 reshard_after_forward=false prefetch_blocks=2", (EXPERTS,)),
    (4, "expert=2", (EXPERTS, SHARED_EXPERT)),
    (4, "expert=4", (EXPERTS,)),
    (4, "pipeline=2 expert=2", (EXPERTS, SHARED_EXPERT)),
    (4, f"pipeline=2 {INTERLEAVED} expert=2", (EXPERTS,)),
    (4, f"pipeline=2 {ZERO_BUBBLE}zbv_zero_bubble expert=2", (EXPERTS,)),
    (4, "context=2 expert=2", (EXPERTS, SHARED_EXPERT)),
    (4, "context=2 expert=4", (EXPERTS,)),
    (4, "replicate=2 expert=2", (EXPERTS, SHARED_EXPERT)),
    (4, "tensor=2 expert=2 recompute=full", (SHARED_EXPERT,)),
    (4, "tensor=2 shard=2", (SHARED_EXPERT, EXPERTS)),
]
"""Slow, as what is left of the others."""
EXTENDED_CASES: list[Case] = [
    (2, "tensor=2 compile=on", (WHOLE, PACKED, *OPTIONS[:3])),
    (2, "context=2 compile=on", (PACKED,)),
    (2, f"context=2 {RING} compile=on", (PACKED,)),
    (4, "tensor=2 context=2 compile=on", (NORMED,)),
    (4, "tensor=2 shard=2 compile=on", (PACKED,)),
    (4, f"tensor=2 pipeline=2 {INTERLEAVED} compile=on", (PACKED,)),
    (2, "expert=2 compile=on", (EXPERTS, SHARED_EXPERT)),
]
"""Most of their time is compilation."""


def parameters():
    """Every layout with every model that is named for it."""
    quick = {(settings, models[0]) for _, settings, models in CASES}
    for case in CASES + MORE_CASES + EXTENDED_CASES:
        world_size, settings, models = case
        for model in models:
            marks = [] if (settings, model) in quick else [pytest.mark.slow]
            if case in EXTENDED_CASES:
                marks.append(pytest.mark.extended)
            yield pytest.param(world_size, settings, model, id=f"{settings}, {model}", marks=marks)


@pytest.fixture(scope="module")
def reference(one_rank, tmp_path_factory):
    """Gives a model's YAML file, and what one process does with it."""
    known = {}

    def get(model: Model):
        if model not in known:
            path = parity_run.write_run(tmp_path_factory.mktemp("parity"), model)
            known[model] = path, parity_run.five_steps(one_rank, path, [])
        return known[model]

    return get


def options_of(settings: str) -> list[str]:
    """ "tensor=2 micro_batch_size=4" as command-line options."""
    options = []
    for setting in settings.split():
        key, value = setting.split("=")
        section = "training" if key in ("micro_batch_size", "compile") else "parallel"
        options += [f"--{section}.{key}", value]
    return options


@pytest.fixture
def train_on(one_rank, new_ranks, request):
    """Trains on a number of ranks."""

    def train(world_size, path, settings):
        if world_size == 1:
            return parity_run.five_steps(one_rank, path, options_of(settings))
        if "compile=on" in settings:
            cluster = new_ranks(world_size)
        else:
            cluster = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
        return parity_run.joined(cluster.run(parity_run.five_steps, path, options_of(settings)))

    return train


@pytest.mark.parametrize(("world_size", "settings", "model"), list(parameters()))
def test_same_numbers_as_one_process(world_size, settings, model, reference, train_on):
    path, expected = reference(model)
    actual = train_on(world_size, path, settings)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for ours, theirs in ((actual.gradients, expected.gradients), (actual.parameters, expected.parameters)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
