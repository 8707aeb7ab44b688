"""Estimate the cost of a layout by closed formulas, in microseconds, to choose the layouts to dry run.

Ranks of a pipeline are treated as equal. Activations per token and block are not derived, but measured by a dry run for
each kind of recomputation (:class:`Calibration`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.config.settings import RunConfig
from ...engine.model.architecture import Architecture
from ...engine.model.attention_choice import context_kind
from ...engine.observe.flops import flops_per_token
from ...engine.parallel import adapter, trainable
from ...engine.parallel.layout import Layout
from ...engine.schedule import plan_batches
from .experts import parameters_of, settings_of
from .options import ClusterSpec
from .prediction import StepPrediction, bytes_of, gradient_bytes, predict
from .work import NO_EXPERTS, Collective, CollectiveTotal, ExpertWork, sent_bytes


@dataclass(frozen=True)
class Calibration:
    """Bytes of activations that a block stores for its backward pass, per token, by ``parallel.recompute``.

    For a rank that shares neither matrices nor tokens.
    """

    kept: dict[str, float]


def rough_prediction(config: RunConfig, layout: Layout, cluster: ClusterSpec) -> StepPrediction:
    """Return the estimated time of a step, without the products of Muon, which differ little between layouts."""
    architecture = cluster.architecture
    count = plan_batches(config.training, layout.data_parallel).num_micro_batches
    return predict(
        config,
        layout,
        cluster.gpu,
        cluster.assumptions,
        count,
        _flops(config, layout, architecture) * count,
        _collectives(config, layout, cluster, count),
        _num_trained(config, architecture) / (layout.pipeline * layout.tensor * layout.shard * layout.context),
        experts=_expert_work(config, layout, architecture, count),
    )


def rough_memory(config: RunConfig, layout: Layout, cluster: ClusterSpec, calibration: Calibration) -> float:
    """Return the estimated peak in bytes, a lower estimate: states, gradients, stored activations, parameters always
    gathered.
    """
    architecture, parallel = cluster.architecture, config.parallel
    count = plan_batches(config.training, layout.data_parallel).num_micro_batches
    split = layout.pipeline * layout.tensor
    num_trained = _num_trained(config, architecture)
    mine, trained = architecture.num_parameters / split, num_trained / split
    weight, adapted = bytes_of(config.training.weight_dtype), config.adapter.kind is not None
    # Of an adapter, the base is held in the compute dtype or quantized, and what is trained in the dtype of weights.
    weights = adapter.base_bytes(architecture, config) / split + weight * trained if adapted else weight * mine
    ranks = layout.shard * layout.context
    per_trained = trainable.state_bytes(architecture, config) / num_trained + config.training.average_bytes
    states = (weights + trained * per_trained) / ranks
    once = parallel.reduce_gradients == "step" and count > 1
    # Experts of other ranks are neither gathered, nor have gradients before the reduction.
    elsewhere = parameters_of(architecture) / split * (1 - 1 / parallel.expert)
    whole = 4 * trained * (1 - elsewhere / mine)
    gradients = whole if once or layout.pipeline > 1 else trained * gradient_bytes(config, count) / ranks
    tokens = _tokens(config, layout)
    blocks = architecture.num_layers / layout.pipeline
    recomputed = blocks / parallel.recompute_every
    in_flight = min(count, layout.pipeline)
    if parallel.offload_activations:  # those of the last block stay, and of two more that are on their way
        recomputed, blocks = recomputed * min(1.0, 3 / blocks), min(blocks, 3)
    kept = recomputed * calibration.kept[parallel.recompute] + (blocks - recomputed) * calibration.kept["none"]
    gathered = 0.0 if parallel.reshard_after_forward else 2 * (mine - elsewhere)
    if layout.data_parallel * layout.context == 1 and parallel.cpu_offload is not True:  # copies in the compute dtype
        copied = trained if adapted and not parallel.cpu_offload else mine
        differs = config.training.weight_dtype != config.training.precision or parallel.cpu_offload
        gathered = 2 * copied if differs else 0.0
    on_gpu = 0.0 if parallel.cpu_offload else states + gradients
    return on_gpu + gathered + in_flight * tokens * kept


def _num_trained(config: RunConfig, architecture: Architecture) -> int:
    return trainable.count(architecture, config.training, config.adapter)


def _tokens(config: RunConfig, layout: Layout) -> float:
    """Return the tokens of a micro-batch on each rank that shares it."""
    training = config.training
    return training.micro_batch_size * training.sequence_length / (layout.context * layout.tensor)


def _flops(config: RunConfig, layout: Layout, architecture: Architecture) -> float:
    """Return the FLOPs of a micro-batch on one rank; a forward pass is a third of them if all parameters are
    trained.
    """
    length = config.training.sequence_length
    both = flops_per_token(
        architecture, length, True, trainable.learning(architecture, config.training, config.adapter)
    )
    forward = flops_per_token(architecture, length, causal_halved=True) / 3
    again = {"none": 0.0, "selective": 0.06, "full": 1.0}[config.parallel.recompute] / config.parallel.recompute_every
    return (both + again * forward) * _tokens(config, layout) / layout.pipeline


def _expert_work(config: RunConfig, layout: Layout, architecture: Architecture, count: int) -> ExpertWork:
    """Return the work of the experts of one rank in ``count`` micro-batches: in each pass, three products read the
    experts, or write their gradients, and read or write rows.
    """
    experts, sharing = settings_of(architecture), config.parallel.expert
    if experts is None:
        return NO_EXPERTS
    hidden, inner = architecture.hidden_size, experts.intermediate_size / layout.tensor
    rows = _tokens(config, layout) * layout.tensor * experts.per_token
    passes = 3 + (1 / config.parallel.recompute_every if config.parallel.recompute == "full" else 0)
    times = count * passes * 3 * experts.num_layers / layout.pipeline
    size = 2 * (experts.num_experts / sharing * hidden * inner + rows * (hidden + inner))
    return ExpertWork(times * 2 * rows * hidden * inner, times * size)


def _collectives(
    config: RunConfig, layout: Layout, cluster: ClusterSpec, count: int
) -> dict[Collective, CollectiveTotal]:
    architecture, parallel = cluster.architecture, config.parallel
    found: dict[Collective, CollectiveTotal] = {}

    def add(kind: str, axes: tuple[str, ...], size: float, times: float) -> None:
        ranks, per_node = _group(layout, axes, cluster.assumptions.gpus_per_node, parallel.expert)
        if ranks > 1 and times > 0:
            entry = found.setdefault(Collective(kind, axes, ranks, per_node), CollectiveTotal())
            entry.count += round(times)
            entry.size += size * times
            entry.sent += sent_bytes(kind, size, ranks) * times

    mine = architecture.num_parameters / (layout.pipeline * layout.tensor)
    trained = _num_trained(config, architecture) / (layout.pipeline * layout.tensor)
    reductions = 1 if parallel.reduce_gradients == "step" or layout.pipeline > 1 else count
    sharding = ("shard", "context") if layout.context > 1 else ("shard",)
    gathers = count * (2 if parallel.reshard_after_forward else 1)
    experts = parameters_of(architecture) / (layout.pipeline * layout.tensor) if parallel.expert > 1 else 0.0
    learning = experts * trained / mine
    add("all-gather", sharding, 2 * (mine - experts), gathers)
    add("reduce-scatter", sharding, 4 * (trained - learning), reductions)
    add("all-gather", ("expert_shard",), 2 * experts / parallel.expert, gathers)
    add("reduce-scatter", ("expert_shard",), 4 * learning / parallel.expert, reductions)
    add("all-reduce", ("replicate",), 4 * trained / (layout.shard * layout.context), reductions)
    blocks = count * architecture.num_layers / layout.pipeline
    again = 1 / parallel.recompute_every if parallel.recompute == "full" else 0.0
    # Both halves of a block gather their input's tokens and scatter their output's sums, forward and backward.
    hidden = 2 * architecture.hidden_size * _tokens(config, layout)
    add("all-gather", ("tensor",), hidden * layout.tensor, blocks * (4 + 2 * again))
    add("reduce-scatter", ("tensor",), hidden * layout.tensor, blocks * (4 + again))
    ranks = layout.context
    if context_kind(parallel, architecture) == "ring":  # keys and values in bf16; their gradients in fp32, once more
        pair = 2 * 2 * architecture.num_key_value_heads * architecture.head_dim * _tokens(config, layout)
        add("send", ("context",), pair, blocks * ((ranks - 1) * (2 + again) + 2 * ranks))
    else:
        heads = 2 * (architecture.num_attention_heads + architecture.num_key_value_heads) * architecture.head_dim
        exchanged = 1 / parallel.recompute_every if parallel.recompute != "none" else 0.0  # selective repeats it too
        add("all-to-all", ("context",), 2 * heads * _tokens(config, layout), blocks * (2 + exchanged))
    if (mixture := settings_of(architecture)) is not None:
        # Rows travel to their experts and back in both passes. Recomputation sends them to their experts only.
        rows = hidden * layout.tensor * mixture.per_token
        add("all-to-all", ("expert",), rows, (4 + again) * count * mixture.num_layers / layout.pipeline)
    add("send", ("pipeline",), hidden, 2 * count)
    return found


def _group(layout: Layout, axes: tuple[str, ...], gpus_per_node: int, expert: int) -> tuple[int, int]:
    """Return (total ranks, ranks in one node) of a group along neighbouring axes."""
    if axes == ("expert",):
        return expert, max(1, min(expert, gpus_per_node // layout.tensor))
    if axes == ("expert_shard",):
        ranks = layout.shard * layout.context // expert
        return ranks, max(1, min(ranks, gpus_per_node // (layout.tensor * expert)))
    ranks = 1
    for axis in axes:
        ranks *= getattr(layout, axis)
    stride, names = 1, list(layout._fields)
    for axis in names[names.index(axes[-1]) + 1 :]:
        stride *= getattr(layout, axis)
    return ranks, max(1, min(ranks, gpus_per_node // stride))
