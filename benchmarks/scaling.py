"""Compute the communication per step of Qwen2-72B by layout: the table of docs/benchmarks.md, "Scaling on paper".

    python benchmarks/scaling.py

Computed from datasheet bandwidths; nothing is measured. ``tensor`` GPUs of one node split every matrix and, by sequence
parallelism, every activation (Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198). The other ``shard`` x
``replicate`` ranks read different data, shard weights and optimizer states over ``shard`` ranks (FSDP2,
https://arxiv.org/abs/2304.11277) and all-reduce gradients over ``replicate`` copies. Left out: latency, contention,
clipping and loss (bytes), pipeline and context parallelism. The result is a
bound on what can be hidden, not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass

from retemper.benchmarks.report import table
from retemper.engine.model.architecture import Architecture
from retemper.engine.model.implementations import parse_architecture
from retemper.engine.observe.flops import flops_per_token
from retemper.engine.parallel.layout import Layout

QWEN2_72B = parse_architecture(
    {
        # Hugging Face config.json of Qwen/Qwen2-72B
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
)
SEQUENCE_LENGTH = 4096
FLOPS_PER_SECOND = 400e12
"""Rate of one GPU while it computes: an assumption, 40 % of an H100's or H200's dense bf16 peak."""
TOKENS = 8192
"""Tokens per data-parallel rank, in one micro-batch."""
LAYOUTS = (
    Layout(tensor=1, shard=32),
    Layout(tensor=2, shard=16),
    Layout(tensor=4, shard=8),
    Layout(tensor=8, shard=4),
    Layout(tensor=1, shard=512),
    Layout(tensor=1, shard=32, replicate=16),
    Layout(tensor=8, shard=64),
    Layout(tensor=8, shard=4, replicate=16),
)


@dataclass(frozen=True)
class Links:
    """One direction, bytes per second per GPU. Vendors' datasheets; the rest of a machine is slower."""

    intra_node: float = 450e9
    """NVLink 4 of an H100 or H200: 900 GB/s in both directions together."""
    inter_node: float = 50e9
    """One 400 Gb/s network card per GPU."""
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends in one step, in bytes, and the seconds of that at the links' full rate."""

    gather_bytes: float
    """All-gathers of weights in bf16."""
    reduce_bytes: float
    """Reduce-scatters of gradients, and their all-reduce over copies."""
    tensor_bytes: float
    """All-gathers and reduce-scatters of activations between the GPUs that split a matrix."""
    weight_seconds: float
    """Weights and gradients. Can run beside the computation."""
    tensor_seconds: float
    """Activations. Stand between one matrix product and the next, so that nothing hides them unless both are cut up."""


def ring_bytes(size: float, ranks: int) -> float:
    """Return the bytes that each of ``ranks`` sends in an all-gather or reduce-scatter of ``size`` bytes in all.

    It is the least possible (Patarasuk and Yuan, 2009, https://doi.org/10.1016/j.jpdc.2008.09.002). An all-reduce sends
    twice that.
    """
    return size * (ranks - 1) / ranks


def step_traffic(
    architecture: Architecture,
    layout: Layout,
    tokens_per_replica: int,
    micro_batches: int,
    links: Links | None = None,
    reshard_after_forward: bool = True,
) -> Traffic:
    """Communication of one GPU in one optimizer step.

    Args:
        architecture: the model.
        layout: how GPUs are used.
        tokens_per_replica: tokens that the ``tensor`` GPUs of one data-parallel rank process together in a step.
        micro_batches: gradient accumulation; weights are gathered and gradients reduced once for each.
        links: bandwidths; default :class:`Links`.
        reshard_after_forward: weights are gathered again for the backward pass.

    Rings over several nodes use the network cards of all their GPUs in a node.
    """
    links = links or Links()
    # A tensor-parallel rank's share of the weights is gathered in bf16 and its gradients are reduced in fp32.
    weights = architecture.num_parameters / layout.tensor
    gathers = 2 if reshard_after_forward else 1
    gather = micro_batches * gathers * ring_bytes(2 * weights, layout.shard)
    reduce_shards = micro_batches * ring_bytes(4 * weights, layout.shard)
    reduce_copies = micro_batches * 2 * ring_bytes(4 * weights / layout.shard, layout.replicate)

    # Per block: attention and feed-forward each gather their input and scatter their output, and the same in the
    # backward pass, which gathers the input once more for the weights' gradients. Hidden states are bf16.
    hidden = 2 * architecture.hidden_size * tokens_per_replica
    collectives = 2 * (2 + 3) * architecture.num_layers
    tensor = collectives * ring_bytes(hidden, layout.tensor)

    shard_rate = _rate(layout.tensor * layout.shard, layout.shard, links)
    copy_rate = _rate(layout.world_size, layout.replicate, links)
    tensor_rate = _rate(layout.tensor, layout.tensor, links)
    return Traffic(
        gather_bytes=gather,
        reduce_bytes=reduce_shards + reduce_copies,
        tensor_bytes=tensor,
        weight_seconds=(gather + reduce_shards) / shard_rate + reduce_copies / copy_rate,
        tensor_seconds=tensor / tensor_rate,
    )


def compute_seconds(
    architecture: Architecture, layout: Layout, tokens_per_replica: int, sequence_length: int, flops_per_second: float
) -> float:
    """Seconds of one GPU's arithmetic in a step at ``flops_per_second``, causal pairs counted once."""
    return (
        tokens_per_replica
        * flops_per_token(architecture, sequence_length, causal_halved=True)
        / (layout.tensor * flops_per_second)
    )


def tokens_to_hide(
    architecture: Architecture,
    layout: Layout,
    sequence_length: int,
    flops_per_second: float,
    links: Links | None = None,
) -> float:
    """Tokens per data-parallel rank and micro-batch at which computing takes as long as moving weights and gradients.

    With fewer, a step waits for the network however well both overlap. Computing and tensor-parallel exchange grow with
    the tokens, weights and gradients do not.
    """
    traffic = step_traffic(architecture, layout, tokens_per_replica=1, micro_batches=1, links=links)
    per_token = compute_seconds(architecture, layout, 1, sequence_length, flops_per_second) + traffic.tensor_seconds
    return traffic.weight_seconds / per_token


def memory_bytes(architecture: Architecture, layout: Layout) -> float:
    """Bytes per GPU of fp32 weights, two moments and gradients, before activations and gathered weights."""
    return 16 * architecture.num_parameters / (layout.tensor * layout.shard)


def _rate(span: int, ranks: int, links: Links) -> float:
    """Bytes per second per GPU of a ring of ``ranks`` over ``span`` consecutive GPUs. Over several nodes, NCCL cuts the
    data into as many rings as the group has GPUs in a node, each of which leaves the node through another network card;
    inside the node all of them share NVLink.
    """
    if ranks == 1 or span <= links.gpus_per_node:
        return links.intra_node
    in_a_node = max(1, links.gpus_per_node // (span // ranks))
    return min(links.intra_node, links.inter_node * in_a_node)


def format_table() -> str:
    """Return a Markdown table, one row for each layout."""
    header = ["tensor x shard x replicate", "GPUs", "weights, gradients, states", "gathered", "reduced"]
    header += ["time of these", "tensor parallel", "computing", "tokens per rank that hide it", "tokens per step then"]
    rows = []
    for layout in LAYOUTS:
        traffic = step_traffic(QWEN2_72B, layout, TOKENS, micro_batches=1)
        computing = compute_seconds(QWEN2_72B, layout, TOKENS, SEQUENCE_LENGTH, FLOPS_PER_SECOND)
        tokens = tokens_to_hide(QWEN2_72B, layout, SEQUENCE_LENGTH, FLOPS_PER_SECOND)
        rows.append(
            [
                f"{layout.tensor} x {layout.shard} x {layout.replicate}",
                f"{layout.world_size}",
                f"{memory_bytes(QWEN2_72B, layout) / 1e9:.1f} GB",
                f"{traffic.gather_bytes / 1e9:.1f} GB",
                f"{traffic.reduce_bytes / 1e9:.1f} GB",
                f"{traffic.weight_seconds:.2f} s",
                f"{traffic.tensor_bytes / 1e9:.1f} GB, {traffic.tensor_seconds:.2f} s",
                f"{computing:.2f} s",
                f"{tokens:,.0f}",
                f"{tokens * layout.shard * layout.replicate / 1e6:.2f} M",
            ]
        )
    return "\n".join(table(header, rows))


if __name__ == "__main__":
    print(format_table())
