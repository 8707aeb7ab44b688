"""Run the command: return a text and a record for a configuration and a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...engine.config.settings import RunConfig, to_dict
from ...engine.errors import UserError
from ...engine.parallel.precision import with_named_precision
from .gpus import GiB
from .outcome import Outcome, dtypes
from .pool import Pool
from .report import format_found, format_needless_recomputation, format_outcome, to_record
from .request import Setting
from .search import calibrate, describe, judge, judge_short, narrower, require_possible, search, without_recomputation


def rehearse(
    config: RunConfig, setting: Setting, wants_search: bool, quick: bool, say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """Return the plan of ``config`` on a cluster, as a text and as a record.

    Args:
        config: of the run.
        setting: the cluster.
        wants_search: try layouts, instead of the configured one.
        quick: rehearse a few blocks only.
        say: receives progress lines.

    Raises:
        UserError: the layout is impossible, or no layout fits.
    """
    record: dict[str, Any] = {"config": to_dict(config)}
    config, left_out = rehearsable(config)
    if left_out:
        say(f"rehearsed without {', '.join(left_out)}, which need a GPU")
    if not wants_search:
        require_possible(config, setting)
    with Pool() as pool:
        if wants_search:
            text, best, outcomes = _search(config, setting, pool, quick, say)
            record["search"] = [to_record(outcome) for outcome in outcomes]
            return text, record | to_record(best)
        outcome = _one(config, setting, pool, quick, say)
        text = format_outcome(outcome)
        if outcome.fits and (faster := without_recomputation(outcome, pool)):
            text += "\n\n" + format_needless_recomputation(outcome, faster)
        return text, record | to_record(outcome)


def _search(
    config: RunConfig, setting: Setting, pool: Pool, quick: bool, say: Callable[[str], None]
) -> tuple[str, Outcome, list[Outcome]]:
    """Return (text, the layout to use, all rehearsed layouts).

    Raises:
        UserError: no layout fits.
    """
    calibration = calibrate(config, setting, pool)
    found = search(config, setting, pool, say, calibration)
    outcomes, parts = list(found.outcomes), [format_found(found)]
    for other in narrower(config):
        if any(one.fits for one in outcomes) and other.training.weight_dtype != config.training.weight_dtype:
            continue  # not requested, and not needed
        say(f"with {dtypes(other)}")
        found = search(other, setting, pool, say, calibration, seconds=40.0, wanted=2)
        outcomes += found.outcomes
        parts += [f"With {dtypes(other)}, which is another run than the configured one:", format_found(found)]
    best = next((one for one in outcomes if one.fits), None)  # of the configured run, if one of its layouts fits
    if best is None:
        raise UserError(_nothing_fits(outcomes, setting))
    if not quick:
        kind = "of the configured run" if dtypes(best.config) == dtypes(config) else f"with {dtypes(best.config)}"
        best = _one(best.config, setting, pool, False, say)
        parts += [f"The fastest {kind}, rehearsed in full:", format_outcome(best)]
    parts += ["To use it:", _settings(best, config)]
    return "\n\n".join(parts), best, outcomes


def rehearsable(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the run without settings that need a GPU, and the keys of these. None of them takes more memory."""
    config = with_named_precision(config, "bf16")  # the meaning of auto on every GPU in the table
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


def _one(config: RunConfig, setting: Setting, pool: Pool, quick: bool, say: Callable[[str], None]) -> Outcome:
    layout = require_possible(config, setting)
    if quick:
        say(f"rehearsing a few blocks: {layout}")
        return judge_short([(config, layout)], setting, pool)[0]
    places = f", {layout.pipeline} places of the pipeline" if layout.pipeline > 1 else ""
    say(f"rehearsing all {setting.architecture.num_layers} blocks on rank 0 of {layout.world_size}: {layout}{places}")

    def report(done: int, total: int) -> None:
        if total > 1:
            say(f"{done} of {total} places rehearsed")

    return judge(config, layout, setting, pool, report)


def _nothing_fits(outcomes: list[Outcome], setting: Setting) -> str:
    room = f"{setting.gpu.name} on {setting.nodes} x {setting.assumptions.gpus_per_node} GPUs"
    if not outcomes:
        return f"--gpu {room}: no layout fits by formulas; use more or larger GPUs, or parallel.cpu_offload true"
    smallest = min(outcomes, key=lambda one: one.peak_bytes)
    return (
        f"--gpu {room}: no layout fits; the smallest one rehearsed ({describe(smallest)}, with "
        f"{dtypes(smallest.config)}) needs {-smallest.headroom / GiB:.1f} GiB more on each GPU; use more or larger "
        "GPUs, or parallel.cpu_offload true"
    )


def _settings(outcome: Outcome, configured: RunConfig) -> str:
    """Return the keys of the configuration that define the layout."""
    config, layout = outcome.config, outcome.layout
    parallel, training, optimizer = config.parallel, config.training, config.optimizer
    lines = ["    training:", f"      micro_batch_size: {training.micro_batch_size}"]
    if training.weight_dtype != configured.training.weight_dtype:
        lines.append(f"      weight_dtype: {training.weight_dtype}")
    if optimizer.state_dtype != configured.optimizer.state_dtype:
        lines += ["    optimizer:", f"      state_dtype: {optimizer.state_dtype}"]
    lines.append("    parallel:")
    lines += [f"      {axis}: {size}" for axis, size in layout._asdict().items() if size > 1 and axis != "shard"]
    lines += ["      shard: auto", f"      recompute: {parallel.recompute}"]
    return "\n".join(lines)
