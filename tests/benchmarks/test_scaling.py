"""Communication per step: against rings that are played through, torch's own collectives, and hand-made cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from retemper.benchmarks.scaling import (
    QWEN2_72B,
    Links,
    compute_seconds,
    format_table,
    memory_bytes,
    ring_bytes,
    step_traffic,
    tokens_to_hide,
)
from retemper.engine.parallel.layout import Layout


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_that_is_played_through_sends_as_much(ranks):
    """Every rank passes on, in each round, the newest piece it holds, until all hold all pieces."""
    pieces = [{rank} for rank in range(ranks)]
    newest = list(range(ranks))
    sent = [0] * ranks
    while any(len(held) < ranks for held in pieces):
        moved = list(newest)
        for rank in range(ranks):
            sent[rank] += 1
            pieces[(rank + 1) % ranks].add(moved[rank])
            newest[(rank + 1) % ranks] = moved[rank]
    piece_bytes = 1000
    assert ring_bytes(ranks * piece_bytes, ranks) == pytest.approx(sent[0] * piece_bytes)
    assert len(set(sent)) == 1


def test_one_gpu_sends_nothing():
    traffic = step_traffic(QWEN2_72B, Layout(tensor=1, shard=1), 4096, 1)
    assert traffic.gather_bytes == traffic.reduce_bytes == traffic.tensor_bytes == 0
    assert tokens_to_hide(QWEN2_72B, Layout(), 4096, 1e15) == 0


def test_weights_of_qwen2_72b_over_32_gpus():
    """72.7 billion parameters (the model's card): twice 2 bytes gathered and 4 bytes reduced, of which 1/32 is here."""
    traffic = step_traffic(QWEN2_72B, Layout(tensor=1, shard=32), 4096, 1)
    assert traffic.gather_bytes == pytest.approx(4 * 72.7e9 * 31 / 32, rel=2e-3)
    assert traffic.reduce_bytes == pytest.approx(4 * 72.7e9 * 31 / 32, rel=2e-3)
    assert traffic.weight_seconds == pytest.approx(8 * 72.7e9 * 31 / 32 / (8 * 50e9), rel=2e-3)


def test_links_are_of_the_widest_span():
    # Eight network cards of 50 GB/s carry what leaves a node of eight GPUs that are all of the group.
    inside = step_traffic(QWEN2_72B, Layout(tensor=1, shard=8), 4096, 1)
    outside = step_traffic(QWEN2_72B, Layout(tensor=1, shard=9), 4096, 1)
    assert inside.weight_seconds == pytest.approx((inside.gather_bytes + inside.reduce_bytes) / 450e9)
    assert outside.weight_seconds == pytest.approx((outside.gather_bytes + outside.reduce_bytes) / 400e9)
    # Two GPUs of a node split matrices, so eight shards reach over two nodes, four of a group in each.
    spread = step_traffic(QWEN2_72B, Layout(tensor=2, shard=8), 4096, 1)
    assert spread.weight_seconds == pytest.approx((spread.gather_bytes + spread.reduce_bytes) / 200e9)
    # Where eight GPUs split matrices, one of each group is in a node, and has one card.
    alone = step_traffic(QWEN2_72B, Layout(tensor=8, shard=4), 4096, 1)
    assert alone.weight_seconds == pytest.approx((alone.gather_bytes + alone.reduce_bytes) / 50e9)
    # Copies of one node each: shards inside, only the sums of gradients outside.
    hybrid = step_traffic(QWEN2_72B, Layout(tensor=1, shard=8, replicate=4), 4096, 1)
    assert hybrid.weight_seconds == pytest.approx(
        inside.weight_seconds + (hybrid.reduce_bytes - inside.reduce_bytes) / 50e9
    )


def test_accumulation_and_resharding():
    once = step_traffic(QWEN2_72B, Layout(shard=32), 4096, 1)
    four = step_traffic(QWEN2_72B, Layout(shard=32), 4096, 4)
    kept = step_traffic(QWEN2_72B, Layout(shard=32), 4096, 1, reshard_after_forward=False)
    assert four.gather_bytes == 4 * once.gather_bytes and four.reduce_bytes == 4 * once.reduce_bytes
    assert kept.gather_bytes == once.gather_bytes / 2 and kept.reduce_bytes == once.reduce_bytes


def test_activations_between_tensor_parallel_ranks():
    """A block's forward pass: two gathers and two scatters of [T, H] in bf16; backward: the same and two gathers."""
    tokens, ranks = 4096, 8
    one = tokens * 8192 * 2 * (ranks - 1) / ranks
    traffic = step_traffic(QWEN2_72B, Layout(tensor=ranks, shard=4), tokens, 1)
    assert traffic.tensor_bytes == pytest.approx(80 * (4 + 6) * one)
    assert traffic.tensor_seconds == pytest.approx(80 * 10 * one / 450e9)


def test_at_the_tokens_to_hide_both_take_as_long():
    layout, rate = Layout(tensor=8, shard=4), 400e12
    tokens = round(tokens_to_hide(QWEN2_72B, layout, 4096, rate))
    traffic = step_traffic(QWEN2_72B, layout, tokens, 1)
    computing = compute_seconds(QWEN2_72B, layout, tokens, 4096, rate)
    assert computing + traffic.tensor_seconds == pytest.approx(traffic.weight_seconds, rel=1e-2)
    # With links twice as fast, half as many tokens do.
    fast = Links(intra_node=900e9, inter_node=100e9)
    slow = Layout(tensor=1, shard=32)
    assert tokens_to_hide(QWEN2_72B, slow, 4096, rate, fast) == pytest.approx(
        tokens_to_hide(QWEN2_72B, slow, 4096, rate) / 2
    )


def test_memory_is_of_weights_gradients_and_two_moments():
    assert memory_bytes(QWEN2_72B, Layout(tensor=8, shard=4)) == pytest.approx(16 * 72.7e9 / 32, rel=2e-3)
    assert memory_bytes(QWEN2_72B, Layout(shard=8, replicate=4)) == pytest.approx(16 * 72.7e9 / 8, rel=2e-3)


def test_the_documented_table_is_the_computed_one():
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert format_table() in page.read_text(encoding="utf-8")
