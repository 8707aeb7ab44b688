"""The products of Muon in tools/plan.py: against PyTorch's counter of operations in real steps, and counts by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import plan_runs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retemper.engine.optim import muon
from retemper.engine.optim.newton_schulz import newton_schulz, newton_schulz_flops
from retemper.tools.planning.dry_run import SimulatedRank, fresh_constants
from retemper.tools.planning.extrapolation import dry_run_short
from retemper.tools.planning.memory import MemoryCounter
from retemper.tools.planning.options import PlanOptions
from retemper.tools.planning.orthogonalization import Matrix, matrices_of, waited_flops
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.report import assumption_lines, format_plan
from retemper.tools.planning.search import plan_briefly, require_possible

MUON = "--optimizer.name muon --training.precision fp32"


@pytest.fixture(scope="module")
def pool():
    with DryRunPool(1) as processes:
        yield processes


def counted(function, *arguments):
    """The operations that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 7), (3, 8, 20)])
def test_operations_of_an_iteration_are_those_that_pytorch_counts(shape):
    expected, _ = counted(newton_schulz, torch.randn(shape), 5)
    assert newton_schulz_flops(shape, 5) == expected > 0


def real_products(ranks, spec):
    """The operations of each product of this rank in a real step, a list for each exchange after one of those without,
    and what a plan knows of them."""
    with fresh_constants():
        run = SimulatedRank(spec, ranks, MemoryCounter())
        run.one_step()
        found, plain, exchange = [[]], muon.newton_schulz, muon.Muon._exchange

        def count(matrix, num_steps):
            flops, result = counted(plain, matrix, num_steps)
            found[-1].append(flops)
            return result

        def begin(optimizer, updates):
            found.append([])
            exchange(optimizer, updates)

        muon.newton_schulz, muon.Muon._exchange = count, begin
        try:
            run.one_step()
        finally:
            muon.newton_schulz, muon.Muon._exchange = plain, exchange
        return found, matrices_of(run.optimizer, run.model.blocks())


@pytest.mark.parametrize(
    "overrides",
    ["", "--parallel.replicate 2", pytest.param("--parallel.tensor 2", marks=pytest.mark.slow)],
    ids=["shard", "replicate", "tensor"],
)
def test_ranks_wait_for_the_largest_product_of_each_round(overrides, tmp_path, pool, fresh_ranks):
    path = plan_runs.write_config(tmp_path, num_hidden_layers=3)
    spec = plan_runs.spec_of(plan_runs.configure(path, f"{MUON} {overrides}"), 2)
    real = fresh_ranks.run(real_products, spec)
    (usage,) = pool.run([spec])
    assert usage.matrices == real[0][1] and len(usage.matrices) == 4 and not usage.matrices[-1]
    planned = [one.flops for block in usage.matrices for one in block]
    calls = [found for found, _ in real]
    rounds = [max(flops) for some in zip(*calls, strict=True) for flops in zip_longest(*some, fillvalue=0)]
    assert waited_flops(usage.matrices, on_host=False) == sum(rounds)
    if not overrides:
        # 21 matrices of 4 query heads, 2 key/value heads, 32 features each, and an inner width of 384.
        shapes = 3 * [(128, 128), (64, 128), (64, 128), (128, 128), (384, 128), (384, 128), (128, 384)]
        assert sorted(planned) == sorted(newton_schulz_flops(shape, 5) for shape in shapes)
        assert sum(sum(some) for found in calls for some in found) == sum(planned) > sum(rounds) > sum(planned) / 2


def test_a_few_blocks_tell_the_matrices_of_all(tmp_path, pool):
    path = plan_runs.write_config(tmp_path, num_hidden_layers=9)
    spec = replace(plan_runs.spec_of(plan_runs.configure(path, MUON), 2, capability=(9, 0)), whole_steps=False)
    (whole,), (short,) = pool.run([spec]), dry_run_short([spec], pool.run)
    assert short.matrices == whole.matrices and len(whole.matrices) == 10


def test_rounds_by_hand():
    matrices = ((Matrix(10, 0, 2), Matrix(4, 0, 2)), (Matrix(6, 0, 2), Matrix(3, 1, 4)), (Matrix(5, None, 1),))
    assert waited_flops(matrices, on_host=False) == 10 + 6 + 3 + 5
    assert waited_flops(matrices, on_host=True) == 10 + 6 + 3
    assert waited_flops(((),), on_host=False) == waited_flops((), on_host=False) == 0


def test_products_take_part_of_the_step(tmp_path, pool):
    """On one rank all of them; with weights in host memory the host computes them, which the plan says."""
    path = plan_runs.write_config(tmp_path)
    found = {}
    for name, overrides in (("muon", MUON), ("adamw", ""), ("offload", f"{MUON} --parallel.cpu_offload optimizer")):
        config = plan_runs.configure(path, overrides)
        cluster = PlanOptions(1, 1, "h100-80gb", 0.5, 4.0, None).cluster(plan_runs.spec_of(config, 1).architecture)
        (found[name],) = plan_briefly([(config, require_possible(config, cluster))], cluster, pool)
    plan = found["muon"]
    products = sum(one.flops for block in plan.fullest.matrices for one in block)
    assert products > 0 and plan.prediction.products == pytest.approx(products / (0.5 * plan.cluster.gpu.flops))
    others = replace(plan.prediction, products=0.0)
    assert plan.prediction.step == pytest.approx(others.step + plan.prediction.products)
    assert "+ Muon's products" in format_plan(plan)
    assert found["adamw"].prediction.products == found["offload"].prediction.products == 0
    assert "Muon" not in format_plan(found["adamw"])
    assert any("products of Muon that the host computes" in line for line in assumption_lines(found["offload"]))
    assert not any("the host computes" in line for line in assumption_lines(plan))
