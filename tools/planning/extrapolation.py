"""Extrapolate the dry run of a whole model from those of a few blocks and micro-batches.

Blocks are equal, so memory at a given moment of a step, operations and traffic are linear in their number. Operations
and traffic are also linear in the number of micro-batches. Memory no longer grows once there are enough of
them to fill the pipeline and to accumulate gradients. Therefore dry runs of few blocks give that of all, exactly
except for rounding of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ...engine.config.settings import RunConfig
from ...engine.parallel.layout import Layout
from ...engine.parallel.pipeline import cut_layers, stage_numbers
from ...engine.parallel.trainable import is_same_in_every_block
from ...engine.schedule import plan_batches
from .dry_run import RankSpec, RankUsage
from .work import CollectiveTotal

RunAll = Callable[[list[RankSpec]], list[RankUsage]]
"""Dry runs several ranks, possibly concurrently."""


def places(layout: Layout) -> range:
    """Return the places in the pipeline, whose ranks do different work."""
    return range(layout.pipeline)


def short_specs(spec: RankSpec) -> list[RankSpec]:
    """Return the dry runs needed for ``spec``: a few blocks, some more blocks, and a few with more micro-batches.

    The last is needed only if the run has more. A model that is so small itself, or whose blocks do not all train the
    same parameters, is dry run as it is.
    """
    config, layout = spec.config, spec.layout
    parallel = config.parallel
    # At the beginning, in the middle and at the end of a pass, blocks that are gathered ahead differ from others.
    # Both numbers are even or odd, so that the halves of the backward pass have the same blocks at their ends.
    blocks, step = parallel.prefetch_blocks + 4, 2 * parallel.recompute_every
    own = num_blocks(spec)
    if own <= blocks + step or not is_same_in_every_block(spec.architecture, config.training, config.adapter):
        return [replace(spec, whole_steps=False)]
    blocks += (own - blocks) % step
    few, more = _few_micro_batches(config, layout)
    short = replace(spec, config=few, blocks_per_stage=blocks, whole_steps=False)
    specs = [short, replace(short, blocks_per_stage=blocks + step)]
    if config.training.global_batch_size != few.training.global_batch_size:
        specs.append(replace(short, config=more))
    return specs


def extrapolate(spec: RankSpec, usages: list[RankUsage]) -> RankUsage:
    """Return what the rank of ``spec`` holds and does, from the results of :func:`short_specs`."""
    if len(usages) == 1:
        return usages[0]
    first, second, *more = usages
    own = num_blocks(spec)
    weight = (own - first.blocks) / (second.blocks - first.blocks)

    def line(a: float, b: float) -> float:
        return a + weight * (b - a)

    def scaled(value: float, some: float, others: float) -> float:
        """Extrapolate ``value`` to the number of micro-batches of the run."""
        if not more or not some:
            return value
        return value * (some + steps * (others - some)) / some

    def most_of(phase: str) -> dict[str, float]:
        """Return the most of each kind in a phase; some small tensors exist only with one more micro-batch."""
        most = _mixed(first.phase_most[phase], second.phase_most[phase], line)
        added = more[0].phase_most[phase] if more else first.phase_most[phase]
        return {kind: value + max(0.0, added[kind] - first.phase_most[phase][kind]) for kind, value in most.items()}

    few, many = _few_micro_batches(spec.config, spec.layout)
    counts = [_num_micro_batches(config, spec.layout) for config in (spec.config, few, many)]
    steps = (counts[0] - counts[1]) / (counts[2] - counts[1])
    collectives = {}
    for key, sent in first.collectives.items():
        there = second.collectives.get(key, CollectiveTotal())
        with_more = more[0].collectives.get(key, CollectiveTotal()) if more else CollectiveTotal()
        collectives[key] = CollectiveTotal(
            round(scaled(line(sent.count, there.count), sent.count, with_more.count)),
            scaled(line(sent.size, there.size), sent.size, with_more.size),
            scaled(line(sent.sent, there.sent), sent.sent, with_more.sent),
        )
    return RankUsage(
        spec.place,
        own,
        line(first.parameters, second.parameters),
        line(first.trained, second.trained),
        _mixed(first.kept, second.kept, line),
        {name: _mixed(first.peaks[name], second.peaks[name], line) for name in first.peaks},
        {name: most_of(name) for name in first.phase_most},
        scaled(line(first.flops, second.flops), first.flops, more[0].flops if more else 0.0),
        collectives,
        scaled(
            line(first.sent_activations, second.sent_activations),
            first.sent_activations,
            more[0].sent_activations if more else 0.0,
        ),
    )


def num_blocks(spec: RankSpec) -> int:
    """Return the number of the whole model's blocks on the rank at this place."""
    parallel, layout = spec.config.parallel, spec.layout
    stages = cut_layers(spec.architecture, layout.pipeline * parallel.pipeline_stages_per_rank)
    numbers = stage_numbers(parallel.pipeline_schedule, spec.place, layout.pipeline, parallel.pipeline_stages_per_rank)
    return sum(stages[number].stop - stages[number].start for number in numbers)


def _few_micro_batches(config: RunConfig, layout: Layout) -> tuple[RunConfig, RunConfig]:
    """Return the run with the fewest micro-batches that need the memory of all, and with some more."""
    count = _num_micro_batches(config, layout)
    # One more than the pipeline holds: the peak is in a forward pass after the first gradients.
    few = layout.pipeline + 1
    if config.parallel.pipeline_schedule != "1f1b":  # equally many for each turn of the ranks
        few = 2 * layout.pipeline * config.parallel.pipeline_stages_per_rank
    few = min(count, few)
    more = few + (1 if config.parallel.pipeline_schedule == "1f1b" else layout.pipeline)
    width = config.training.micro_batch_size * layout.data_parallel
    few_config, more_config = (
        replace(config, training=replace(config.training, global_batch_size=number * width)) for number in (few, more)
    )
    return few_config, more_config


def _num_micro_batches(config: RunConfig, layout: Layout) -> int:
    return plan_batches(config.training, layout.data_parallel).num_micro_batches


def _mixed(one: dict[str, float], other: dict[str, float], mix: Callable[[float, float], float]) -> dict[str, float]:
    return {kind: max(0.0, mix(value, other[kind])) for kind, value in one.items()}


def dry_run_short(specs: Iterable[RankSpec], run_all: RunAll) -> list[RankUsage]:
    """Return the results of ``specs``, by extrapolation."""
    specs = list(specs)
    short = [short_specs(spec) for spec in specs]
    done = iter(run_all([one for group in short for one in group]))
    return [extrapolate(spec, [next(done) for _ in group]) for spec, group in zip(specs, short, strict=True)]
