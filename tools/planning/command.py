"""Run the command: return a text and a record for a configuration and a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...engine.config.settings import RunConfig, to_dict
from ...engine.errors import UserError
from ...engine.offload_choice import with_named_offload
from ...engine.parallel.precision import with_named_precision
from .known_budget import with_planned_budget
from .layout_plan import LayoutPlan, dtypes
from .offload_choice import choose_offload
from .options import ClusterSpec
from .pool import DryRunPool
from .report import (
    format_found,
    format_needless_recomputation,
    format_plan,
    format_savings,
    savings_record,
    to_record,
)
from .savings import find_savings
from .search import (
    calibrate,
    narrower,
    plan_briefly,
    plan_in_full,
    require_possible,
    search,
    without_recomputation,
)


def make_plan(
    config: RunConfig, cluster: ClusterSpec, wants_search: bool, quick: bool, say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """Return the plan of ``config`` on a cluster, as a text and as a record.

    Args:
        config: of the run.
        cluster: the cluster.
        wants_search: try layouts, instead of the configured one.
        quick: dry run a few blocks only.
        say: receives progress lines.

    Raises:
        UserError: the layout is impossible, no layout fits, or the budget is in epochs of unknown data.
    """
    config = with_planned_budget(config)
    record: dict[str, Any] = {"config": to_dict(config)}
    config, left_out = without_gpu_features(config, cluster)
    if left_out:
        say(f"dry run without {', '.join(left_out)}, which need a GPU")
    if not wants_search:
        require_possible(with_named_offload(config, False), cluster)
    with DryRunPool() as pool:
        if wants_search:
            text, best, plans = _search(with_named_offload(config, False), cluster, pool, quick, say)
            record["search"] = [to_record(plan) for plan in plans]
            return text, record | to_record(best)
        choice = choose_offload(config, cluster, pool, say)
        if choice is None:
            plan = _one(config, cluster, pool, quick, say)
            text = format_plan(plan)
        else:
            plan = choice.plan if quick else _one(choice.config, cluster, pool, False, say)
            text, record["cpu_offload"] = f"{choice}\n\n{format_plan(plan)}", choice.record
        if plan.fits and (faster := without_recomputation(plan, pool)):
            text += "\n\n" + format_needless_recomputation(plan, faster)
        return text, record | to_record(plan)


def list_savings(config: RunConfig, cluster: ClusterSpec, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """Return the changes of ``config`` that need less memory on a cluster, as a text and as a record.

    Args:
        config: of the run.
        cluster: the cluster.
        say: receives progress lines.

    Raises:
        UserError: the layout is impossible, or the budget is in epochs of unknown data.
    """
    config = with_planned_budget(config)
    record: dict[str, Any] = {"config": to_dict(config)}
    config, left_out = without_gpu_features(config, cluster)
    if left_out:
        say(f"dry run without {', '.join(left_out)}, which need a GPU")
    with DryRunPool() as pool:
        choice = choose_offload(config, cluster, pool, say)
        plan, savings = find_savings(config if choice is None else choice.config, cluster, pool)
    return format_savings(plan, savings), record | to_record(plan) | {"savings": savings_record(plan, savings)}


def _search(
    config: RunConfig, cluster: ClusterSpec, pool: DryRunPool, quick: bool, say: Callable[[str], None]
) -> tuple[str, LayoutPlan, list[LayoutPlan]]:
    """Return (text, the layout to use, the plans of all layouts that were dry run).

    Raises:
        UserError: no layout fits.
    """
    calibration = calibrate(config, cluster, pool)
    found = search(config, cluster, pool, say, calibration)
    plans, parts = list(found.plans), [format_found(found)]
    for other in narrower(config):
        if any(one.fits for one in plans) and other.training.weight_dtype != config.training.weight_dtype:
            continue  # not requested, and not needed
        say(f"with {dtypes(other)}")
        found = search(other, cluster, pool, say, calibration, seconds=40.0, wanted=2)
        plans += found.plans
        parts += [f"With {dtypes(other)}, which is another run than the configured one:", format_found(found)]
    best = next((one for one in plans if one.fits), None)  # of the configured run, if one of its layouts fits
    if best is None:
        raise UserError(_nothing_fits(plans, cluster))
    if not quick:
        kind = "of the configured run" if dtypes(best.config) == dtypes(config) else f"with {dtypes(best.config)}"
        best = _one(best.config, cluster, pool, False, say)
        parts += [f"The fastest {kind}, dry run in full:", format_plan(best)]
    parts += ["To use it:", _settings(best, config)]
    return "\n\n".join(parts), best, plans


def without_gpu_features(config: RunConfig, cluster: ClusterSpec) -> tuple[RunConfig, list[str]]:
    """Return the run without settings that need a GPU, and the keys of these. None of them takes more memory."""
    config = with_named_precision(config, "bf16" if cluster.gpu.has_bf16 else "fp16")  # the meaning of auto there
    training, parallel = config.training, config.parallel
    left_out = []
    if training.float8:
        left_out.append("training.float8")
    if parallel.async_tensor:
        left_out.append("parallel.async_tensor")
    plain = replace(
        config,
        # The check for spikes reads the loss, which has no value here.
        training=replace(training, float8=False, loss_spike_zscore=None),
        parallel=replace(parallel, async_tensor=False),
    )
    return plain, left_out


def _one(
    config: RunConfig, cluster: ClusterSpec, pool: DryRunPool, quick: bool, say: Callable[[str], None]
) -> LayoutPlan:
    layout = require_possible(config, cluster)
    if quick:
        say(f"dry run of a few blocks: {layout}")
        return plan_briefly([(config, layout)], cluster, pool)[0]
    places = f", {layout.pipeline} places of the pipeline" if layout.pipeline > 1 else ""
    say(f"dry run of all {cluster.architecture.num_layers} blocks on rank 0 of {layout.world_size}: {layout}{places}")

    def report(done: int, total: int) -> None:
        if total > 1:
            say(f"{done} of {total} places done")

    return plan_in_full(config, layout, cluster, pool, report)


def _nothing_fits(plans: list[LayoutPlan], cluster: ClusterSpec) -> str:
    room = f"{cluster.gpu.name} on {cluster.nodes} x {cluster.assumptions.gpus_per_node} GPUs"
    if not plans:
        return f"--gpu {room}: no layout fits by formulas; use more or larger GPUs, or parallel.cpu_offload true"
    smallest = min(plans, key=lambda one: (one.headroom < 0, one.host_bytes if one.headroom >= 0 else one.peak_bytes))
    return (
        f"--gpu {room}: no layout fits; the smallest one ({smallest.shown_layout}, with "
        f"{dtypes(smallest.config)}) needs {smallest.shortage}; use more or larger GPUs, "
        f"{_REMEDY[smallest.headroom < 0]}"
    )


_REMEDY = {True: "or parallel.cpu_offload true", False: "more nodes, or less offload"}
"""By whether a GPU is too small."""


def _settings(plan: LayoutPlan, configured: RunConfig) -> str:
    """Return the keys of the configuration that define the layout."""
    config, layout = plan.config, plan.layout
    parallel, training, optimizer = config.parallel, config.training, config.optimizer
    lines = ["    training:", f"      micro_batch_size: {training.micro_batch_size}"]
    if training.weight_dtype != configured.training.weight_dtype:
        lines.append(f"      weight_dtype: {training.weight_dtype}")
    if optimizer.state_dtype != configured.optimizer.state_dtype:
        lines += ["    optimizer:", f"      state_dtype: {optimizer.state_dtype}"]
    lines.append("    parallel:")
    lines += [f"      {axis}: {size}" for axis, size in layout._asdict().items() if size > 1 and axis != "shard"]
    lines += [f"      expert: {parallel.expert}"] if parallel.expert > 1 else []
    lines += ["      shard: auto", f"      recompute: {parallel.recompute}"]
    return "\n".join(lines)
