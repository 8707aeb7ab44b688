"""Ring attention: keys and values travel around the ranks, and every rank attends with its own queries.

Liu et al., 2023, https://arxiv.org/abs/2310.01889. The number of ranks does not depend on the number of heads.

The T tokens of a micro-batch are cut into 2 x ranks chunks. Rank r holds chunks r and 2 x ranks - 1 - r ("zigzag"), so
that the ranks have equal work in a long document: a late chunk sees many keys, an early one few. In each step a rank
attends to the keys that it holds, while it sends them to the next rank and receives those of the previous one.

Because a chunk is a range of tokens, a chunk of queries and an earlier chunk of keys have at most one document in
common: the one that contains everything between them. So all work is one causal attention over the rank's own pieces of
documents, and a few rectangles without a causal mask, whatever the documents are.

The operator is opaque to torch.compile and to selective recomputation, which store its result as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from ...kernels.attention.blocks import Block, BlockOptions, attend, attend_backward, merge

Step = tuple[Block, ...]
"""The blocks of one rank's queries and one rank's keys."""


def zigzag(num_tokens: int, rank: int, ranks: int) -> tuple[slice, slice]:
    """Return the two chunks of ``rank``, in the order in which it holds them."""
    size = num_tokens // (2 * ranks)
    first, second = rank * size, (2 * ranks - 1 - rank) * size
    return slice(first, first + size), slice(second, second + size)


@functools.lru_cache(maxsize=64)
def plan_ring(lengths: Sequence[int], rank: int, ranks: int, window: int | None) -> tuple[Step, ...]:
    """Return the work of ``rank`` in each of ``ranks`` steps. In step s it has the keys of rank ``rank - s``.

    Args:
        lengths: tokens of each document of a micro-batch.
        rank: this rank.
        ranks: number of ranks.
        window: of the attention.
    """
    starts, position = [], 0
    for length in lengths:
        starts.append(position)
        position += length
    documents = [(start, start + length) for start, length in zip(starts, lengths, strict=True) if length]
    mine = zigzag(position, rank, ranks)
    own_lengths = tuple(length for chunk in mine for length in _pieces(documents, chunk))
    steps = []
    for step in range(ranks):
        theirs = zigzag(position, (rank - step) % ranks, ranks)
        diagonal = [Block(0, 0, own_lengths, own_lengths, 0)] if step == 0 else []
        steps.append((*diagonal, *_rectangles(documents, mine, theirs, window)))
    return tuple(steps)


def _pieces(documents: list[tuple[int, int]], chunk: slice) -> Iterator[int]:
    """Yield the number of tokens of each document in ``chunk``."""
    for start, stop in documents:
        length = min(stop, chunk.stop) - max(start, chunk.start)
        if length > 0:
            yield length


def _rectangles(
    documents: list[tuple[int, int]], mine: tuple[slice, slice], theirs: tuple[slice, slice], window: int | None
) -> Iterator[Block]:
    """Yield the blocks of the queries in my chunks and the keys in earlier chunks."""
    for number, queries in enumerate(mine):
        # The document that begins before this chunk and extends into it.
        start, stop = next((d for d in documents if d[0] < queries.start < d[1]), (queries.start, queries.start))
        for other, keys in enumerate(theirs):
            first, last = max(keys.start, start), keys.stop - 1
            if last >= queries.start:
                continue
            end = min(queries.stop, stop)
            if window is not None:
                first, end = max(first, queries.start - window + 1), min(end, last + window)
            if first > last or end <= queries.start:
                continue
            size = queries.stop - queries.start
            first_key = other * size + first - keys.start
            count, num_keys = end - queries.start, last + 1 - first
            yield Block(number * size, first_key, (count,), (num_keys,), queries.start - first)


def ring_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    offsets: Tensor,
    group: dist.ProcessGroup,
    backend: str,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute causal attention inside each document, for this rank's tokens. All ranks of ``group`` must call this.

    Args:
        q_TND: queries of this rank's tokens, in the order of :func:`zigzag`.
        k_TKD: their keys.
        v_TKE: their values.
        offsets: [documents + 1] int32 in host memory: offsets of the documents in the tokens of all ranks.
        group: the ranks with the tokens of the same samples, in order.
        backend: one of ``BLOCK_BACKENDS``.
        softmax_scale: factor on the scores; default 1 / sqrt(D).
        window: a token sees itself and the ``window - 1`` tokens before it; None for all.
        softcap: as in :func:`retemper.kernels.attention.attention`.
        sinks: [N] attention sinks. Their gradient is that of this rank's queries.

    Returns:
        [T, N, E] in the dtype of ``q_TND``.
    """
    scale = q_TND.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _ring(q_TND, k_TKD, v_TKE, sinks, offsets, group.group_name, backend, scale, window, softcap)[0]


def scratch_bytes(q: Tensor, k: Tensor, v: Tensor, backward: bool) -> int:
    """Return the bytes that the operator holds besides its arguments and results, for backends of bf16 kernels."""
    pair, size = k.numel() + v.numel(), q.element_size()
    # Two buffers of keys and values. The output in fp32; that of a block is gone before the result is there.
    buffers, output = 2 * size * pair, 4 * (q.numel() // q.shape[-1]) * v.shape[-1]
    if not backward:
        return buffers + output
    # The gradient of all queries in fp32; sums of those of keys and values that arrive, that leave, and of this rank.
    # The gradients of the first block are gone before the results are there, and those of its keys are smaller.
    return buffers + 4 * q.numel() + 3 * 4 * pair - size * pair


@torch.library.custom_op("retemper::ring_attention", mutates_args=())
def _ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    offsets: torch.Tensor,
    group: str,
    backend: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output, [N, T] log-sum-exp)."""
    ranks = _resolve_process_group(group)
    options = BlockOptions(backend, scale, window, softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:2], v.shape[-1]), dtype=wide)
    lse = q.new_full((q.shape[1], len(q)), -torch.inf, dtype=wide)
    if sinks is not None:  # a key whose value is zero
        lse.copy_(sinks.to(wide)[:, None].expand_as(lse))

    def compute(blocks: Step, keys: Tensor, values: Tensor) -> None:
        for block in blocks:
            rows = block.queries
            merge(out[rows], lse[:, rows], *attend(q[rows], keys[block.keys], values[block.keys], block, options))

    _around(k, v, _plan(offsets, ranks, window), ranks, compute)
    return out.to(q.dtype), lse


@_ring.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    offsets: Tensor,
    group: str,
    backend: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@torch.library.custom_op("retemper::ring_attention_backward", mutates_args=())
def _ring_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    offsets: torch.Tensor,
    group: str,
    backend: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ranks = _resolve_process_group(group)
    options = BlockOptions(backend, scale, window, softcap)
    dq = torch.zeros_like(q, dtype=lse.dtype)
    travelling: list[_Exchange] = []

    def compute(blocks: Step, keys: Tensor, values: Tensor) -> None:
        gradients = torch.zeros(k.numel() + v.numel(), dtype=lse.dtype, device=k.device)
        dk, dv = _unpacked(gradients, k, v)
        for block in blocks:
            rows, seen = block.queries, block.keys
            tensors = grad[rows], q[rows], keys[seen], values[seen], out[rows], lse[:, rows]
            _add((dq[rows], dk[seen], dv[seen]), attend_backward(*tensors, block, options))
        # The sums of the earlier ranks follow their keys, one step later.
        if travelling:
            gradients += travelling.pop().received()
        travelling.append(_Exchange(gradients, ranks))

    _around(k, v, _plan(offsets, ranks, window), ranks, compute)
    dk, dv = _unpacked(travelling.pop().received(), k, v)
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@_ring_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, offsets, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, sinks, offsets, out, lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, sinks, offsets, out, lse = ctx.saved_tensors
    d_sinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        # The softmax gives the sink the probability exp(sink - lse), and its value is zero.
        delta_NT = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T
        d_sinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta_NT).sum(1).to(sinks.dtype)
    return (*_ring_backward(grad, q, k, v, out, lse, offsets, *ctx.options), d_sinks, None, *([None] * 5))


_ring.register_autograd(_backward, setup_context=_keep)


def _plan(offsets: Tensor, ranks: dist.ProcessGroup, window: int | None) -> tuple[Step, ...]:
    return plan_ring(tuple(offsets.diff().tolist()), ranks.rank(), ranks.size(), window)


def _around(
    k: Tensor,
    v: Tensor,
    steps: tuple[Step, ...],
    group: dist.ProcessGroup,
    compute: Callable[[Step, Tensor, Tensor], None],
) -> None:
    """Call ``compute(blocks, keys, values)`` for each step. The keys and values of the next step travel meanwhile."""
    packed = torch.cat((k.reshape(-1), v.reshape(-1)))
    for number, blocks in enumerate(steps):
        exchange = _Exchange(packed, group) if number + 1 < len(steps) else None
        compute(blocks, *_unpacked(packed, k, v))
        if exchange is not None:
            packed, exchange = exchange.received(), None  # frees the buffer that was sent


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def _unpacked(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values in a buffer, with the shapes of ``k`` and ``v``."""
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)


class _Exchange:
    """Sends a buffer to the next rank and receives that of the previous one, without waiting for the device."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup):
        self._sent, self._received = sent, torch.empty_like(sent)
        rank, size = group.rank(), group.size()
        operations = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size),
        ]
        self._requests = dist.batch_isend_irecv(operations)

    def received(self) -> Tensor:
        """Return the buffer of the previous rank. On a GPU the current stream waits for it."""
        for request in self._requests:
            request.wait()
        return self._received
