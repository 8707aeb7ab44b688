"""Ring attention: outputs and gradients are those of one process, for any documents and any numbers of heads."""

from __future__ import annotations

import functools
import itertools
import random
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from oracles.packed_attention import explicit_attention
from torch import Tensor

from retemper.engine.parallel import ring
from retemper.engine.parallel.context import own_tokens
from retemper.engine.parallel.ring import plan_ring, ring_attention, zigzag
from retemper.tools.planning.memory import MemoryCounter

TOKENS = 32


class Case(NamedTuple):
    """Documents, heads and options of one attention."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    value_size: int = 8
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False


def random_cases(count: int) -> list[Case]:
    """Cuts of the tokens into documents, some of them empty, with random heads and options."""
    chosen = random.Random(5)
    cases = []
    for _ in range(count):
        cuts = sorted(chosen.choices(range(TOKENS + 1), k=chosen.choice((0, 1, 2, 4, 9, 20))))
        lengths = tuple(stop - start for start, stop in itertools.pairwise([0, *cuts, TOKENS]))
        kv_heads = chosen.choice((1, 2, 3))
        cases.append(
            Case(
                lengths,
                heads=kv_heads * chosen.choice((1, 2, 3)),
                kv_heads=kv_heads,
                value_size=chosen.choice((4, 8, 12)),
                window=chosen.choice((None, None, 1, 3, 7, 15, 40)),
                softcap=chosen.choice((None, 1.5)),
                scale=chosen.choice((None, 0.2)),
                sinks=chosen.random() < 0.4,
            )
        )
    return cases


CASES = [Case((TOKENS,)), Case((1,) * TOKENS), Case((0, 31, 0, 1, 0)), Case((9, 14, 9), window=5), *random_cases(20)]


def make_inputs(case: Case) -> list[Tensor]:
    """Queries, keys, values, sinks and an upstream gradient of all tokens, in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(case.heads, 8), (case.kv_heads, 8), (case.kv_heads, case.value_size)]
    tensors = [torch.randn(TOKENS, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sinks = torch.randn(case.heads, generator=generator, dtype=torch.float64)
    return [*tensors, sinks, torch.randn(TOKENS, case.heads, case.value_size, generator=generator, dtype=torch.float64)]


def attend_on_ranks(ranks, cases, kind="ring"):
    """Of every case this rank's output, and the gradients of its queries, keys, values and sinks."""
    results = []
    for case in cases:
        *inputs, sinks, upstream = make_inputs(case)
        parts = own_tokens(TOKENS, ranks.rank, ranks.world_size, kind)
        q, k, v, upstream = (torch.cat([x[part] for part in parts]) for x in (*inputs, upstream))
        leaves = [x.requires_grad_() for x in (q, k, v, *([sinks] if case.sinks else []))]
        output = ring_attention(
            q,
            k,
            v,
            torch.tensor([0, *case.lengths]).cumsum(0, dtype=torch.int32),
            dist.group.WORLD,
            "per_document",
            window=case.window,
            softcap=case.softcap,
            softmax_scale=case.scale,
            sinks=sinks if case.sinks else None,
        )
        output.backward(upstream)
        results.append([output.detach(), *(x.grad for x in leaves)])
    return results


@functools.cache
def expect(case: Case) -> list[Tensor]:
    q, k, v, sinks, upstream = make_inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v, *([sinks] if case.sinks else []))]
    lengths = [length for length in case.lengths if length]
    output = explicit_attention(q, k, v, lengths, case.window, case.scale, case.softcap, sinks if case.sinks else None)
    output.backward(upstream)
    return [output.detach(), *(x.grad for x in leaves)]


def check(results, cases):
    world_size = len(results)
    order = torch.cat([torch.arange(TOKENS)[part] for r in range(world_size) for part in zigzag(TOKENS, r, world_size)])
    for case, of_ranks in zip(cases, zip(*results, strict=True), strict=True):
        for number, (wanted, *parts) in enumerate(zip(expect(case), *of_ranks, strict=True)):
            if number == 4:  # the sinks' gradients are sums over tokens
                torch.testing.assert_close(sum(parts), wanted, rtol=1e-10, atol=1e-12)
                continue
            joined = torch.empty_like(wanted)
            joined[order] = torch.cat(parts)
            torch.testing.assert_close(joined, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}\n{m}")


def test_two_ranks_equal_one_process(two_ranks):
    check(two_ranks.run(attend_on_ranks, CASES), CASES)


def test_four_ranks_equal_one_process(four_ranks):
    check(four_ranks.run(attend_on_ranks, CASES), CASES)  # most cases have fewer heads


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 5, 20])
def test_blocks_are_all_visible_pairs_once(ranks, window):
    """The pairs of tokens of all blocks of all ranks, counted one by one."""
    tokens = 48
    for lengths in ((48,), (1,) * 48, (5, 20, 0, 23), (13, 13, 13, 9)):
        counts = torch.zeros(tokens, tokens, dtype=torch.int64)
        for rank in range(ranks):
            mine = torch.cat([torch.arange(tokens)[part] for part in zigzag(tokens, rank, ranks)])
            for step, blocks in enumerate(plan_ring(lengths, rank, ranks, window)):
                held = [torch.arange(tokens)[part] for part in zigzag(tokens, (rank - step) % ranks, ranks)]
                for block in blocks:
                    queries, keys = mine[block.queries], torch.cat(held)[block.keys]
                    row = column = 0
                    for length, num_keys in zip(block.query_lengths, block.key_lengths, strict=True):
                        for i, j in itertools.product(range(length), range(num_keys)):
                            seen = 0 <= i + block.lag - j < (window or tokens)
                            counts[queries[row + i], keys[column + j]] += seen
                        row, column = row + length, column + num_keys
        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        visible = (documents[:, None] == documents) & (distance >= 0) & (distance < (window or tokens))
        assert torch.equal(counts, visible.long()), lengths


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_one_document_gives_all_ranks_equal_work(ranks):
    work = [
        sum(block.num_pairs for blocks in plan_ring((4096,), rank, ranks, None) for block in blocks)
        for rank in range(ranks)
    ]
    assert max(work) == min(work) == 4096 * 4097 // 2 // ranks


def peaks_on_ranks(ranks):
    """Bytes at the peak of either pass inside the operator, and those that the planner assumes."""

    def attend(q, k, v, block, options):
        return torch.empty_like(q), torch.empty(q.shape[1], len(q))

    def attend_backward(grad, q, k, v, out, lse, block, options):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    heads, kv_heads, size, tokens = 4, 2, 64, 4096
    q, k, v = (
        torch.zeros(tokens // ranks.world_size, n, size, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    )
    lse, offsets = torch.zeros(heads, len(q)), torch.tensor([0, tokens], dtype=torch.int32)
    options = offsets, dist.group.WORLD.group_name, "varlen", 1.0, None, None
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "attend", attend)
        patch.setattr(ring, "attend_backward", attend_backward)
        for backward in (False, True):
            counter = MemoryCounter()
            with counter:
                if backward:
                    results = ring._ring_backward._init_fn(q, q, k, v, q, lse, *options)
                else:
                    results = ring._ring._init_fn(q, k, v, None, *options)
            kept = sum(x.nbytes for x in (*results, q, k, v))
            found.append((sum(counter.peak.values()) - kept, ring.scratch_bytes(q, k, v, backward)))
    return found


def test_the_planner_knows_the_memory_of_the_operator(four_ranks):
    for result in four_ranks.run(peaks_on_ranks):
        for counted, assumed in result:
            assert counted == pytest.approx(assumed, rel=0.05)
