"""Plans of runs with an adapter: frozen weights in bf16, gradients and states of the adapter alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import plan_runs
import pytest

from retemper.engine.config.parser import parse_config
from retemper.engine.model.adapters import adapter_parameters
from retemper.engine.parallel.layout import Layout
from retemper.engine.weights.checkpoint.destination import checkpoint_bytes
from retemper.tools.planning.extrapolation import extrapolate, short_specs
from retemper.tools.planning.formulas import rough_memory, rough_prediction
from retemper.tools.planning.layout_plan import LayoutPlan
from retemper.tools.planning.options import PlanOptions
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.search import calibrate

ADAPTER = "--adapter.kind lora --adapter.rank 16 --adapter.alpha 32"
GIB = 2**30


@pytest.fixture(scope="module")
def pool():
    """A process for dry runs."""
    with DryRunPool(1) as processes:
        yield processes


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A tiny run."""
    return plan_runs.write_config(tmp_path)


def peak(usage) -> float:
    """Bytes at the highest moment."""
    return max(sum(kinds.values()) for kinds in usage.peaks.values())


def test_memory_and_operations_are_those_of_the_formulas(run_file: Path, pool: DryRunPool) -> None:
    """8 ranks, one micro-batch, as in the test without an adapter; the numbers by hand."""
    config = plan_runs.configure(run_file, f"{ADAPTER} --training.global_batch_size 16")
    spec = plan_runs.spec_of(config, 8, capability=(9, 0))
    (usage,) = pool.run([spec])
    tokens, hidden, inner, layers, vocabulary, rank = 2 * 256, 128, 384, 4, 4096, 16
    q, kv = 4 * 32, 2 * 32
    sides = {"q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (q, hidden)}
    sides |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    base = layers * sum(a * b for a, b in sides.values())
    adapter = layers * rank * sum(a + b for a, b in sides.values())
    total = spec.architecture.num_parameters
    assert usage.trained == adapter / 8 and usage.parameters == (total + adapter) / 8
    assert usage.kept["parameters"] == pytest.approx((2 * total + 4 * adapter) / 8, rel=0.02)
    steps = 512 * layers * 2 * len(sides)  # a count for each matrix, rounded up as by the allocator
    assert usage.kept["optimizer states"] == 8 * adapter / 8 + steps
    assert usage.peaks["optimizer"]["gradients"] == pytest.approx(4 * adapter / 8, rel=0.1)
    # Products of a frozen matrix: one forward, one backward. Nothing before the first block has a gradient, so those
    # with its input stop there: q, k and v, their base and their A.
    attention = layers * 7 * 2 * q * tokens * 256 / 2
    first = hidden * (q + 2 * kv) + 3 * hidden * rank
    products = 4 * (base + hidden * vocabulary) + 6 * adapter - 2 * first
    assert usage.flops == pytest.approx(tokens * products + attention, rel=1e-9)
    assert sum(sent.size for key, sent in usage.collectives.items() if key.kind == "reduce-scatter") == 4 * adapter


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "--adapter.quantize_base nf4",
        pytest.param("--adapter.dora true --adapter.modules_to_save [lm_head]", marks=pytest.mark.slow),
    ],
)
def test_memory_of_one_rank_is_what_the_allocator_gives(overrides: str, run_file: Path, pool: DryRunPool) -> None:
    spec = plan_runs.spec_of(plan_runs.configure(run_file, f"{ADAPTER} {overrides}"), 1)
    (usage,) = pool.run([spec])
    before, most = pool._executor.submit(plan_runs.allocated_alone, spec).result()
    assert sum(usage.kept.values()) == pytest.approx(before, rel=0.02)
    assert peak(usage) == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("layout", ["", pytest.param("--parallel.tensor 2", marks=pytest.mark.slow)])
def test_memory_of_two_ranks_is_what_real_tensors_take(layout: str, run_file: Path, pool, two_ranks) -> None:
    spec = plan_runs.spec_of(plan_runs.configure(run_file, f"{ADAPTER} {layout}"), 2)
    real, (usage,) = two_ranks.run(plan_runs.counted, spec)[0], pool.run([spec])
    assert sum(usage.kept.values()) == pytest.approx(sum(real.kept.values()), rel=0.02)
    assert peak(usage) == pytest.approx(peak(real), rel=0.05)


@pytest.mark.parametrize(("targets", "runs"), [("['*']", 2), ("['*.layers.1?.*.q_proj']", 1)])
def test_a_few_blocks_tell_the_whole_model_if_all_have_the_same_adapters(
    targets: str, runs: int, tmp_path: Path, pool: DryRunPool
) -> None:
    file = plan_runs.write_config(tmp_path, num_hidden_layers=12)
    words = [*ADAPTER.split(), "--adapter.targets", targets, "--training.global_batch_size", "2"]
    config = parse_config(["--config", str(file), *words])
    spec = plan_runs.spec_of(config, 1, capability=(9, 0))
    short = short_specs(spec)
    assert len(short) == runs
    if runs > 1:
        found, whole = extrapolate(spec, pool.run(short)), pool.run([spec])[0]
        assert found.trained == whole.trained and found.flops == pytest.approx(whole.flops, rel=1e-6)
        assert peak(found) == pytest.approx(peak(whole), rel=0.01)


def test_formulas_and_checkpoints_know_the_adapter(run_file: Path, pool: DryRunPool) -> None:
    config = plan_runs.configure(run_file, ADAPTER)
    spec = plan_runs.spec_of(config, 1, capability=(9, 0))
    cluster = PlanOptions(1, 1, "rtx4090", 0.55, 4.0, None).cluster(spec.architecture)
    (usage,) = pool.run([spec])
    plan = LayoutPlan(config, Layout(), cluster, [usage], extrapolated=False)
    trained = adapter_parameters(spec.architecture, config.adapter).num_trained
    assert plan.checkpoint_bytes == checkpoint_bytes(config, spec.architecture) == 12 * trained
    calibration = calibrate(config, cluster, pool)
    rough = rough_memory(config, Layout(), cluster, calibration)
    assert 0.5 * plan.peak_bytes < rough < plan.peak_bytes
    assert rough_prediction(config, Layout(), cluster).step == pytest.approx(plan.prediction.step, rel=0.15)
    whole = replace(config, adapter=replace(config.adapter, kind=None))
    quantized = replace(config, adapter=replace(config.adapter, quantize_base="nf4"))
    matrices = adapter_parameters(spec.architecture, config.adapter).modules.values()
    elements = sum(linear.in_features * linear.out_features for linear in matrices)
    saved = rough - rough_memory(quantized, Layout(), cluster, calibration)
    tables = len(matrices) * 4 * (16 + 256 + 1)  # of the values of both kinds of codes, and the mean of the scales
    # 4.127 bits per element: section 3 of the QLoRA paper.
    assert saved == pytest.approx((2 - 4.127 / 8) * elements - tables, rel=1e-3)
    assert rough < 0.6 * rough_memory(whole, Layout(), cluster, calibration)
