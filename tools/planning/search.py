"""Search for the fastest layout that fits: formulas choose what to dry run, dry runs decide."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...engine.config.checks import validate
from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.parallel.build import Choices, check
from ...engine.parallel.layout import Layout, plan_layout
from ...engine.schedule import plan_batches
from ...kernels.attention import Choice
from .dry_run import RankSpec, RankUsage, attention_backend
from .experts import sizes_of as expert_sizes
from .extrapolation import dry_run_short, places
from .formulas import Calibration, rough_memory, rough_prediction
from .layout_plan import LayoutPlan, shown_layout
from .options import ClusterSpec
from .pool import DryRunPool
from .simulated_cluster import CPU

_LEAST_TOKENS = 4096
"""Minimum tokens of a sample on each of the ranks that share it: layouts with fewer are not tried."""
_LONGEST_PIPELINE = 8
"""Longest pipeline to try: longer ones are seldom better with fast sharding, and take long to dry run."""
_AT_ONCE = 2
"""Layouts dry run between two checks of the time."""
_Recompute = Literal["none", "selective", "full"]
_LESS_RECOMPUTATION: dict[_Recompute, tuple[_Recompute, ...]] = {
    "none": (),
    "selective": ("none",),
    "full": ("none", "selective"),
}
"""Alternatives with less recomputation, the fastest first."""


@dataclass(frozen=True)
class Candidate:
    """A possible layout."""

    config: RunConfig
    layout: Layout
    rough_rate: float
    """Tokens per second of all GPUs, by formulas."""
    rough_bytes: float
    """Peak bytes, by formulas."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    plans: list[LayoutPlan]
    """Layouts of which a rank was dry run: those that fit, the fastest first; then the others, the smallest first."""
    num_possible: int
    num_too_large: int
    """Number of layouts that are too large by formulas alone."""
    num_left: int
    """Number of other layouts: slower by formulas than those."""
    timed_out: bool = False
    """Whether time was up before enough layouts fitted."""
    configured: LayoutPlan | None = None
    """That of ``plans`` whose layout is the configured one; None if that is impossible."""


def search(
    config: RunConfig,
    cluster: ClusterSpec,
    pool: DryRunPool,
    say: Callable[[str], None],
    calibration: Calibration | None = None,
    seconds: float = 120.0,
    wanted: int = 6,
) -> SearchResult:
    """Dry run the configured layout, and others, the fastest by formulas first, until ``wanted`` fit or time is up.

    Args:
        config: of the run; its dtypes are those of all layouts.
        cluster: the cluster.
        pool: processes for dry runs.
        say: receives progress lines.
        calibration: of the model, if known; it does not depend on the dtypes of weights and states.
        seconds: time after which no more layouts are tried.
        wanted: number of other layouts that fit.
    """
    start = time.monotonic()
    calibration = calibration or calibrate(config, cluster, pool)
    all_candidates = candidates(config, cluster, calibration)
    room = cluster.gpu.memory - cluster.reserve
    hopeful = sorted((c for c in all_candidates if c.rough_bytes <= room), key=lambda c: -c.rough_rate)
    too_large = len(all_candidates) - len(hopeful)
    say(f"{len(all_candidates)} layouts are possible, {too_large} of them too large by formulas")
    configured = _plan_configured(config, cluster, pool)
    if configured is not None:
        known, architecture = configured.shown_layout, cluster.architecture
        hopeful = [one for one in hopeful if shown_layout(one.config, one.layout, architecture) != known]
    plans: list[LayoutPlan] = []
    position = 0
    while position < len(hopeful) and sum(o.fits for o in plans) < wanted and time.monotonic() - start < seconds:
        batch = hopeful[position : position + _AT_ONCE]
        position += len(batch)
        plans += plan_briefly([(one.config, one.layout) for one in batch], cluster, pool)
        say(f"{position} layouts tried with a few blocks, {sum(o.fits for o in plans)} fit")
    timed_out = position < len(hopeful) and sum(o.fits for o in plans) < wanted
    plans += [] if configured is None else [configured]
    plans.sort(key=lambda o: (not o.fits, -o.tokens_per_second if o.fits else o.peak_bytes))
    return SearchResult(plans, len(all_candidates), too_large, max(0, len(hopeful) - position), timed_out, configured)


def _plan_configured(config: RunConfig, cluster: ClusterSpec, pool: DryRunPool) -> LayoutPlan | None:
    """Return the plan of the configured layout; None if it is impossible on the cluster."""
    try:
        layout = require_possible(config, cluster)
    except UserError:
        return None
    return plan_briefly([(config, layout)], cluster, pool)[0]


def narrower(config: RunConfig) -> list[RunConfig]:
    """Return the run with bf16 optimizer states, and with bf16 weights too, if it does not have these already."""
    found = []
    if config.optimizer.has_state_dtype and config.optimizer.state_dtype != "bf16":
        config = replace(config, optimizer=replace(config.optimizer, state_dtype="bf16"))
        found.append(config)
    if config.training.weight_dtype != "bf16":
        found.append(replace(config, training=replace(config.training, weight_dtype="bf16")))
    return found


def without_recomputation(plan: LayoutPlan, pool: DryRunPool) -> LayoutPlan | None:
    """Return the fastest layout with less recomputation that fits and is faster, if any.

    Args:
        plan: of a layout that fits.
        pool: processes for dry runs.
    """
    for mode in _LESS_RECOMPUTATION[plan.config.parallel.recompute]:
        parallel = replace(plan.config.parallel, recompute=mode, recompute_every=1)
        config = replace(plan.config, parallel=parallel)
        try:
            validate(config)
            require_possible(config, plan.cluster)
        except UserError:
            continue
        (other,) = plan_briefly([(config, plan.layout)], plan.cluster, pool)
        if other.fits and other.tokens_per_second > plan.tokens_per_second:
            return other
    return None


def plan_briefly(layouts: list[tuple[RunConfig, Layout]], cluster: ClusterSpec, pool: DryRunPool) -> list[LayoutPlan]:
    """Return the plans of layouts, by dry runs of a few blocks.

    For a pipeline these are its first rank, which holds the most micro-batches, and its last, which has the loss.
    """
    groups = [[one for one in specs_of(*each, cluster) if one.place in _ends(each[1])] for each in layouts]
    done = iter(dry_run_short(itertools.chain(*groups), pool.run))
    return [
        LayoutPlan(config, layout, cluster, [next(done) for _ in group], extrapolated=True)
        for (config, layout), group in zip(layouts, groups, strict=True)
    ]


def _ends(layout: Layout) -> set[int]:
    return {0, layout.pipeline - 1}


def plan_in_full(
    config: RunConfig, layout: Layout, cluster: ClusterSpec, pool: DryRunPool, report: Callable[[int, int], None]
) -> LayoutPlan:
    """Return the plan of a layout, by a dry run of all blocks."""
    ranks: list[RankUsage] = pool.run(specs_of(config, layout, cluster), report)
    return LayoutPlan(config, layout, cluster, ranks, extrapolated=False)


def specs_of(config: RunConfig, layout: Layout, cluster: ClusterSpec) -> list[RankSpec]:
    """Return one rank of each place in the pipeline."""
    return [
        RankSpec(
            config,
            cluster.architecture,
            layout,
            cluster.assumptions.gpus_per_node,
            cluster.gpu.capability,
            cluster.gpu.memory,
            place,
        )
        for place in places(layout)
    ]


def require_possible(config: RunConfig, cluster: ClusterSpec) -> Layout:
    """Return the layout of the run.

    Raises:
        UserError: it is impossible, with both sides of the arithmetic.
    """
    layout = plan_layout(config.parallel, cluster.world_size)
    plan = plan_batches(config.training, layout.data_parallel)
    attention = Choice(attention_backend(config, cluster.architecture), "planned")
    choices = Choices(attention, False, plan.num_micro_batches)
    check(config, cluster.architecture, choices, CPU, cluster.world_size)
    return layout


def calibrate(config: RunConfig, cluster: ClusterSpec, pool: DryRunPool) -> Calibration:
    """Measure what a block stores, with two short dry runs of each kind of recomputation."""
    modes = ("none", "selective", "full")
    training = replace(config.training, micro_batch_size=1, global_batch_size=1)
    specs = []
    for mode in modes:
        parallel = _plain(config, pipeline=1, replicate=1, shard=1, context=1, tensor=1, expert=1, recompute=mode)
        one = replace(config, training=training, parallel=parallel)
        gpu = cluster.gpu
        spec = RankSpec(one, cluster.architecture, Layout(), 1, gpu.capability, gpu.memory, whole_steps=False)
        last = cluster.architecture.num_layers - 1  # of a mixture, the first blocks may have no experts
        specs += [replace(spec, stage_blocks=(last,) * blocks) for blocks in (1, 2)]
    usages = pool.run(specs)
    kept = {}
    for number, mode in enumerate(modes):
        first, second = (one.peaks["backward"]["activations"] for one in usages[2 * number : 2 * number + 2])
        kept[mode] = (second - first) / training.sequence_length
    return Calibration(kept)


def candidates(config: RunConfig, cluster: ClusterSpec, calibration: Calibration) -> list[Candidate]:
    """Return all possible layouts of the run among those that are tried."""
    found = []
    for changed, micro_batch in _layouts(config, cluster):
        other = replace(config, parallel=changed, training=replace(config.training, micro_batch_size=micro_batch))
        try:
            validate(other)
            layout = require_possible(other, cluster)
        except UserError:
            continue
        seconds = rough_prediction(other, layout, cluster).step
        tokens = other.training.global_batch_size * other.training.sequence_length
        memory = rough_memory(other, layout, cluster, calibration)
        found.append(Candidate(other, layout, tokens / seconds, memory))
    return found


def _layouts(config: RunConfig, cluster: ClusterSpec) -> Iterator[tuple[Any, int]]:
    """Yield (parallel settings, micro batch) in all combinations, most of which are impossible."""
    world, per_node = cluster.world_size, cluster.assumptions.gpus_per_node
    length = config.training.sequence_length
    contexts = [n for n in _powers(per_node) if n == 1 or length // n >= _LEAST_TOKENS]
    micro_batches = [n for n in _powers(config.training.global_batch_size) if n <= 64]
    for tensor, pipeline, context, replicate, expert, recompute, micro_batch in itertools.product(
        _powers(per_node),
        _powers(min(world, _LONGEST_PIPELINE)),
        sorted({*contexts, config.parallel.context}),
        sorted({1, cluster.nodes}),
        expert_sizes(cluster.architecture, world),
        ("none", "selective", "full"),
        micro_batches,
    ):
        axes = {"tensor": tensor, "pipeline": pipeline, "context": context, "replicate": replicate, "expert": expert}
        yield _plain(config, shard="auto", recompute=recompute, **axes), micro_batch


def _plain(config: RunConfig, **changes: Any) -> Any:
    return replace(config.parallel, pipeline_schedule="1f1b", pipeline_stages_per_rank=1, async_tensor=False, **changes)


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]
