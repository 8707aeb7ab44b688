"""Extrapolate the dry run of a whole model from those of a few blocks and micro-batches.

Blocks of one size are equal, so memory at a given moment of a step, operations and traffic are linear in the number of
blocks of each size. A mixture of experts can have two sizes: blocks with experts and without. Operations and traffic
are also linear in the number of micro-batches. Memory no longer grows once there are enough of them to fill the
pipeline and to accumulate gradients. Therefore dry runs of few blocks give that of all, exactly except for rounding of
sizes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from ...engine.config.settings import RunConfig
from ...engine.model.architecture import BlockSize
from ...engine.parallel.layout import Layout
from ...engine.parallel.pipeline import cut_layers, stage_numbers
from ...engine.parallel.trainable import is_same_in_every_block
from ...engine.schedule import plan_batches
from .dry_run import RankSpec, RankUsage
from .orthogonalization import Matrices
from .work import CollectiveTotal, ExpertWork

RunAll = Callable[[list[RankSpec]], list[RankUsage]]
"""Dry runs several ranks, possibly concurrently."""


def places(layout: Layout) -> range:
    """Return the places in the pipeline, whose ranks do different work."""
    return range(layout.pipeline)


def short_specs(spec: RankSpec) -> list[RankSpec]:
    """Return the dry runs needed for ``spec``: a few blocks, some more blocks of each size, and more micro-batches.

    The last is needed only if the run has more. A model that is so small itself, or whose blocks do not all train the
    same parameters, is dry run as it is.
    """
    few, more = _few_micro_batches(spec.config, spec.layout)
    stages = _short_stages(spec)
    if not stages:
        return [replace(spec, whole_steps=False)]
    specs = [replace(spec, config=few, stage_blocks=blocks, whole_steps=False) for blocks in stages]
    if spec.config.training.global_batch_size != few.training.global_batch_size:
        specs.append(replace(specs[0], config=more))
    return specs


def _short_stages(spec: RankSpec) -> list[tuple[int, ...]]:
    """Return the numbers of a few blocks, and for each size of which there are many, these and some more of that size.

    Nothing if the model has to be dry run as it is.
    """
    config, parallel = spec.config, spec.config.parallel
    groups = _by_size(spec)
    if not is_same_in_every_block(spec.architecture, config.training, config.adapter):
        return []
    if len(groups) > 1 and (parallel.pipeline_stages_per_rank > 1 or parallel.recompute_every > 1):
        return []
    # At the beginning, in the middle and at the end of a pass, blocks that are gathered ahead differ from others.
    # Both numbers are even or odd, so that the halves of the backward pass have the same blocks at their ends.
    few, step = parallel.prefetch_blocks + 4, 2 * parallel.recompute_every
    many = [size for size, numbers in groups.items() if len(numbers) > few + step]
    counts = {size: len(numbers) for size, numbers in groups.items()}
    counts |= {size: few + (counts[size] - few) % step for size in many}
    more = [counts | {size: counts[size] + step} for size in many]
    return [_chosen(groups, one) for one in (counts, *more)] if many else []


def _by_size(spec: RankSpec) -> dict[BlockSize, list[int]]:
    """Return the numbers of the blocks of the rank, by their size."""
    groups: dict[BlockSize, list[int]] = {}
    for number in _own_blocks(spec):
        groups.setdefault(spec.architecture.block_sizes[number], []).append(number)
    return groups


def _chosen(groups: dict[BlockSize, list[int]], counts: dict[BlockSize, int]) -> tuple[int, ...]:
    """Return the first blocks of each size, in the order of the model."""
    return tuple(sorted(number for size, numbers in groups.items() for number in numbers[: counts[size]]))


def _weights(spec: RankSpec, stages: list[tuple[int, ...]]) -> list[float]:
    """Return how many times the blocks that each of ``stages`` but the first has more have to be added to the first."""
    sizes, turns = spec.architecture.block_sizes, spec.config.parallel.pipeline_stages_per_rank
    own, first, *others = (Counter(sizes[number] for number in blocks) for blocks in (_own_blocks(spec), *stages))
    weights = []
    for other in others:
        ((size, more),) = (other - first).items()
        weights.append((own[size] - turns * first[size]) / (turns * more))
    return weights


def extrapolate(spec: RankSpec, usages: list[RankUsage]) -> RankUsage:
    """Return what the rank of ``spec`` holds and does, from the results of :func:`short_specs`."""
    if len(usages) == 1:
        return usages[0]
    stages = _short_stages(spec)
    first, others, more = usages[0], usages[1 : len(stages)], usages[len(stages) :]
    weights = _weights(spec, stages)

    def line(value: float, *with_more: float) -> float:
        return value + sum(weight * (b - value) for weight, b in zip(weights, with_more, strict=True))

    def lines(value: dict[str, float], *with_more: dict[str, float]) -> dict[str, float]:
        return {kind: max(0.0, line(size, *(b[kind] for b in with_more))) for kind, size in value.items()}

    def scaled(value: float, some: float, others: float) -> float:
        """Extrapolate ``value`` to the number of micro-batches of the run."""
        if not more or not some:
            return value
        return value * (some + steps * (others - some)) / some

    def most_of(phase: str) -> dict[str, float]:
        """Return the most of each kind in a phase; some small tensors exist only with one more micro-batch."""
        most = lines(first.phase_most[phase], *(other.phase_most[phase] for other in others))
        added = more[0].phase_most[phase] if more else first.phase_most[phase]
        return {kind: value + max(0.0, added[kind] - first.phase_most[phase][kind]) for kind, value in most.items()}

    def total(read: Callable[[RankUsage], float]) -> float:
        """Extrapolate a number that grows with the micro-batches."""
        value = line(read(first), *map(read, others))
        return scaled(value, read(first), read(more[0]) if more else 0.0)

    few, many = _few_micro_batches(spec.config, spec.layout)
    counts = [_num_micro_batches(config, spec.layout) for config in (spec.config, few, many)]
    steps = (counts[0] - counts[1]) / (counts[2] - counts[1])
    collectives = {}
    for key, sent in first.collectives.items():
        there = [other.collectives.get(key, CollectiveTotal()) for other in others]
        with_more = more[0].collectives.get(key, CollectiveTotal()) if more else CollectiveTotal()
        collectives[key] = CollectiveTotal(
            round(scaled(line(sent.count, *(one.count for one in there)), sent.count, with_more.count)),
            scaled(line(sent.size, *(one.size for one in there)), sent.size, with_more.size),
            scaled(line(sent.sent, *(one.sent for one in there)), sent.sent, with_more.sent),
        )
    return RankUsage(
        spec.place,
        len(_own_blocks(spec)),
        line(first.parameters, *(other.parameters for other in others)),
        line(first.trained, *(other.trained for other in others)),
        lines(first.kept, *(other.kept for other in others)),
        {name: lines(first.peaks[name], *(other.peaks[name] for other in others)) for name in first.peaks},
        {name: most_of(name) for name in first.phase_most},
        total(lambda usage: usage.flops),
        collectives,
        total(lambda usage: usage.sent_activations),
        line(first.host_activations, *(other.host_activations for other in others)),
        line(first.host_rounding, *(other.host_rounding for other in others)),
        ExpertWork(*(total(operator.attrgetter(f"experts.{name}")) for name in ExpertWork._fields)),
        _matrices(spec, first),
    )


def _matrices(spec: RankSpec, short: RankUsage) -> Matrices:
    """Return the matrices of all blocks: blocks of one size have the same ones."""
    sizes, dry_run = spec.architecture.block_sizes, _short_stages(spec)[0]
    *of_blocks, others = short.matrices
    of_size = {sizes[number]: matrices for number, matrices in zip(dry_run, of_blocks, strict=False)}
    return (*(of_size[sizes[number]] for number in _own_blocks(spec)), others)


def _own_blocks(spec: RankSpec) -> list[int]:
    """Return the numbers of the whole model's blocks that the rank at this place has."""
    parallel, layout = spec.config.parallel, spec.layout
    stages = cut_layers(spec.architecture, layout.pipeline * parallel.pipeline_stages_per_rank)
    numbers = stage_numbers(parallel.pipeline_schedule, spec.place, layout.pipeline, parallel.pipeline_stages_per_rank)
    return [block for number in numbers for block in range(*stages[number])]


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


def dry_run_short(specs: Iterable[RankSpec], run_all: RunAll) -> list[RankUsage]:
    """Return the results of ``specs``, by extrapolation."""
    specs = list(specs)
    short = [short_specs(spec) for spec in specs]
    done = iter(run_all([one for group in short for one in group]))
    return [extrapolate(spec, [next(done) for _ in group]) for spec, group in zip(specs, short, strict=True)]
