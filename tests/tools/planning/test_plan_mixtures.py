"""Plans of mixtures of experts, against PyTorch's allocator, closed formulas and dry runs of all blocks."""

from __future__ import annotations

from dataclasses import replace

import plan_runs
import pytest

from retemper.tools.planning.extrapolation import dry_run_short
from retemper.tools.planning.gpus import GPUS
from retemper.tools.planning.options import Assumptions
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.prediction import expert_seconds
from retemper.tools.planning.work import ExpertWork

EXPERTS = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


@pytest.fixture(scope="module")
def pool():
    """A process for dry runs."""
    with DryRunPool(1) as processes:
        yield processes


def peak(usage) -> float:
    """Bytes at the highest moment."""
    return max(sum(kinds.values()) for kinds in usage.peaks.values())


@pytest.mark.parametrize(
    "overrides",
    [
        "--training.precision fp32",
        pytest.param("--parallel.recompute full", marks=pytest.mark.slow),
        pytest.param("--parallel.recompute selective", marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_mixture_is_what_the_allocator_gives(overrides, tmp_path, pool):
    spec = plan_runs.spec_of(plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS), overrides), 1)
    (usage,) = pool.run([spec])
    before, most = pool._executor.submit(plan_runs.allocated_alone, spec).result()
    assert sum(usage.kept.values()) == pytest.approx(before, rel=0.02)
    assert peak(usage) == pytest.approx(most, rel=0.02)


def test_operations_are_those_of_the_chosen_experts(tmp_path, pool):
    """Three products of each matrix that a token uses, and seven of attention with half of the pairs."""
    config = plan_runs.configure(plan_runs.write_config(tmp_path, **EXPERTS, num_hidden_layers=2))
    (usage,) = pool.run([plan_runs.spec_of(config, 1, (9, 0))])
    hidden, inner, q, kv, tokens = 128, 96, 4 * 32, 2 * 32, 4 * 256
    attention, experts, router = hidden * (q + 2 * kv) + q * hidden, 2 * 3 * hidden * inner, 8 * hidden
    matrices = 2 * (attention + experts + router) + 4096 * hidden
    pairs = 2 * 7 * 2 * q * 256 / 2
    assert usage.flops == pytest.approx(tokens * (6 * matrices + pairs), rel=1e-9)
    # The products of experts, each of which reads or writes all experts, and rows of both sides. In bf16.
    rows, count = 2 * tokens, 2 * 3 * 3 * usage_micro_batches(config)
    found = usage.experts
    assert found.flops == pytest.approx(2 * tokens * 6 * experts)
    assert found.bytes == pytest.approx(
        2 * (count * 8 * hidden * inner + 2 * 3 * 3 * rows * (hidden + inner)), rel=1e-9
    )
    assert found.moved > 0


def usage_micro_batches(config) -> int:
    return config.training.global_batch_size // config.training.micro_batch_size


def test_grouped_products_of_few_rows_take_as_long_as_reading_the_experts():
    """989 TFLOP/s x 0.5 and 3.35 TB/s x 0.8."""
    gpu, assumed = GPUS["h100-80gb"], Assumptions(8, efficiency=0.5, link_efficiency=0.8)
    second = 989e12 * 0.5
    assert expert_seconds(ExpertWork(second, 3.35e12 * 0.8 * 1.5, 0.0), gpu, assumed) == pytest.approx(0.5)
    assert expert_seconds(ExpertWork(second, 3.35e12 * 0.8 * 0.5, 3.35e12 * 0.8), gpu, assumed) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("world_size", "blocks", "overrides"),
    [
        (2, {"mlp_only_layers": [0]}, "--parallel.recompute full"),
        pytest.param(2, {"mlp_only_layers": [0, 1, 2]}, "--training.global_batch_size 16", marks=pytest.mark.slow),
        pytest.param(2, {"decoder_sparse_step": 2, "num_hidden_layers": 20}, "", marks=pytest.mark.slow),
        pytest.param(
            2,
            {"mlp_only_layers": [0]},
            "--parallel.pipeline 2 --training.micro_batch_size 1 --training.global_batch_size 5",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_few_blocks_tell_the_whole_mixture(world_size, blocks, overrides, tmp_path, pool):
    """Also if the first blocks have no experts, or every other one."""
    path = plan_runs.write_config(tmp_path, **{"num_hidden_layers": 14, **EXPERTS, **blocks})
    spec = plan_runs.spec_of(plan_runs.configure(path, overrides), world_size, capability=(9, 0))
    specs = [replace(spec, place=place, whole_steps=False) for place in range(spec.layout.pipeline)]
    for whole, short in zip(pool.run(specs), dry_run_short(specs, pool.run), strict=True):
        assert short.blocks == whole.blocks
        assert short.parameters == pytest.approx(whole.parameters, rel=1e-9)
        assert sum(short.kept.values()) == pytest.approx(sum(whole.kept.values()), rel=0.005)
        assert peak(short) == pytest.approx(peak(whole), rel=0.01)
        assert short.flops == pytest.approx(whole.flops, rel=0.01)
        for key, sent in whole.collectives.items():
            if sent.size > 1e6:
                assert short.collectives[key].size == pytest.approx(sent.size, rel=0.02), key
