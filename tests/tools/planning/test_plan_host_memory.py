"""Host memory of offloaded weights, states and activations in tools/plan.py, and the kind of context parallelism."""

from __future__ import annotations

import json
from dataclasses import replace

import plan_runs
import pytest
import torch

from retemper.engine.errors import UserError
from retemper.engine.model.decoder import Decoder
from retemper.engine.parallel.layout import Layout
from retemper.tools.planning import savings as savings_module
from retemper.tools.planning.command import _nothing_fits
from retemper.tools.planning.dry_run import RankUsage
from retemper.tools.planning.gpus import GiB
from retemper.tools.planning.layout_plan import LayoutPlan
from retemper.tools.planning.offload_choice import choose_offload
from retemper.tools.planning.options import PlanOptions, read_architecture
from retemper.tools.planning.pool import DryRunPool
from retemper.tools.planning.report import format_found, format_plan, to_record
from retemper.tools.planning.savings import Change, find_savings
from retemper.tools.planning.search import SearchResult, plan_briefly, require_possible

OFFLOADED = "--parallel.recompute full --parallel.offload_activations true"


@pytest.fixture(scope="module")
def pool():
    with DryRunPool(1) as processes:
        yield processes


@pytest.fixture
def run_file(tmp_path):
    return plan_runs.write_config(tmp_path)


def cluster_of(config, ranks: int = 1, host_memory: float | None = None):
    options = PlanOptions(1, ranks, "a100-80gb", 0.55, 4.0, None, host_memory=host_memory)
    return options.cluster(read_architecture(config.model))


def planned(run_file, overrides: str, pool, ranks: int = 1, host_memory: float | None = None) -> LayoutPlan:
    config = plan_runs.configure(run_file, overrides)
    cluster = cluster_of(config, ranks, host_memory)
    return plan_briefly([(config, require_possible(config, cluster))], cluster, pool)[0]


def rounded(size: int) -> int:
    """The next power of two, by doubling."""
    power = 1
    while power < size:
        power *= 2
    return power


def test_activations_wait_in_pinned_memory(tmp_path, pool):
    """The inputs of all blocks but the last, of one micro-batch; PyTorch reserves powers of two. Extrapolated."""
    layers, run_file = 8, plan_runs.write_config(tmp_path, num_hidden_layers=8)
    plan = planned(run_file, f"{OFFLOADED} --training.micro_batch_size 3 --training.global_batch_size 12", pool)
    assert plan.host_bytes == (layers - 1) * rounded(3 * 256 * 128 * 2) == (layers - 1) * 2**18
    assert plan.fullest.sent_activations == 4 * (layers - 1) * 3 * 256 * 128 * 2
    assert "0.00 GiB of host memory in each node, of which activations" in format_plan(plan)
    assert to_record(plan)["host_bytes"] == plan.host_bytes


def test_weights_that_fsdp_pins_take_powers_of_two(run_file, pool):
    """fp32: weights, gradients and both moments, of which the first two are pinned by each of the two ranks."""
    plan = planned(run_file, "--parallel.cpu_offload true", pool, ranks=2)
    with torch.device("meta"):
        model = Decoder(plan.cluster.architecture)
    shards = [4 * parameter.numel() // 2 for parameter in model.parameters()]
    expected = 2 * sum(2 * rounded(size) + 2 * size for size in shards)
    assert plan.host_bytes == pytest.approx(expected, rel=0.005)
    assert plan.host_bytes > 1.05 * 2 * 4 * sum(shards)  # which is measurably more than the tensors themselves


def test_the_node_with_the_largest_ranks_counts(run_file):
    """Four ranks of two places, two to a node; with three to a node, the first has a rank of the other place."""
    config = plan_runs.configure(run_file, "--parallel.cpu_offload true --parallel.pipeline 2")
    kinds = {"parameters": 1.0 * GiB, "gradients": 0.0, "optimizer states": 2.0 * GiB, "activations": 5.0 * GiB}
    first = RankUsage(0, 2, 1.0, 1.0, kinds, {"": kinds}, {"": kinds}, 0.0, {}, host_activations=4.0 * GiB)
    last = replace(first, place=1, host_activations=0.0, host_rounding=1.0 * GiB)
    plan = LayoutPlan(config, Layout(pipeline=2, shard=2), cluster_of(config, 2), [first, last], False)
    assert plan.host_bytes == 14 * GiB
    three = replace(plan.cluster, assumptions=replace(plan.cluster.assumptions, gpus_per_node=3))
    assert replace(plan, cluster=three).host_bytes == 18 * GiB


def test_a_layout_that_needs_more_than_the_host_has_is_never_offered(run_file, pool):
    plan = planned(run_file, "--parallel.cpu_offload optimizer", pool)
    assert plan.fits and "--host-memory GIB compares it" in format_plan(plan)
    assert "Host memory was not compared" in format_found(SearchResult([plan], 1, 0, 0))
    needed = plan.host_bytes
    for memory, fits in ((needed, True), (0.9 * needed, False)):
        known = replace(plan, cluster=replace(plan.cluster, host_memory=memory))
        table, text = format_found(SearchResult([known], 1, 0, 0)), format_plan(known)
        assert known.fits is fits and to_record(known)["fits"] is fits
        assert "| headroom GiB | host GiB/node | fits |" in table and "not compared" not in table
        assert ("| yes |" if fits else "| no: host memory |") in table
        assert (f"(--host-memory): {'fits' if fits else '0.00 GiB too much'}") in text
    assert "0.0 GiB more host memory in each node; use" in _nothing_fits([known], known.cluster)
    plain = replace(known, config=plan_runs.configure(run_file))
    assert "host" not in format_found(SearchResult([plain], 1, 0, 0)).splitlines()[0]


def test_auto_offload_and_savings_respect_the_host(run_file, pool, monkeypatch):
    monkeypatch.setattr(savings_module, "changes", lambda *_: [Change({"parallel.cpu_offload": True})])
    config = plan_runs.configure(run_file, "--parallel.cpu_offload auto")
    small = replace(cluster_of(config), reserve=80e9)
    config_true = plan_runs.configure(run_file)
    for host_memory, is_enough in ((64 * GiB, True), (2.0**20, False)):
        cluster = replace(cluster_of(config), host_memory=host_memory)
        _, savings = find_savings(config_true, cluster, pool)
        remarks = {saving.remark for saving in savings if "parallel.cpu_offload" in saving.change.settings}
        assert bool(remarks) is is_enough
        assert all("GiB of host memory in each node" in remark for remark in remarks)
    # No GPU memory at all: the choice then depends on the peak only, and names the host's arithmetic.
    tiny = replace(small, host_memory=2.0**20, gpu=replace(small.gpu, memory=int(80e9)))
    choice = choose_offload(config, tiny, pool, lambda line: None)
    assert not choice.plan.fits and "GiB of host memory in each node, which has 0.00 GiB" in choice.reason


@pytest.mark.parametrize(("kind", "shown"), [("auto", "heads"), ("ring", "ring")])
def test_rows_name_the_kind_of_context_parallelism(kind, shown, run_file, pool):
    plan = planned(run_file, f"--parallel.context 2 --parallel.context_kind {kind}", pool, ranks=2)
    row = format_found(SearchResult([plan], 1, 0, 0)).splitlines()[2]
    assert row.startswith(f"| context 2 ({shown}), micro batch 2") and f"context 2 ({shown})" in format_plan(plan)
    record = json.loads(json.dumps(to_record(plan)))
    assert record["context_kind"] == shown and record["parallel"]["context_kind"] == kind


def test_a_kind_is_not_named_without_context_parallelism(run_file, pool):
    plan = planned(run_file, "", pool, ranks=2)
    assert to_record(plan)["context_kind"] is None and "heads" not in plan.shown_layout


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_host_memory_is_refused(memory, run_file):
    with pytest.raises(UserError, match=r"--host-memory .*: must be above 0, in GiB for each node"):
        cluster_of(plan_runs.configure(run_file), host_memory=memory)
