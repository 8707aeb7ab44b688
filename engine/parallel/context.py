"""Context parallelism: ranks share the tokens of the same samples. Attention needs the tokens of other ranks.

Two kinds of attention do this, see ``parallel.context_kind``:

- heads: around attention two exchanges turn "all heads of some tokens" into "some heads of all tokens" and back (Jacobs
  et al., 2023, https://arxiv.org/abs/2309.14509). So any attention backend works unchanged, and all ranks do the same
  work, whatever the documents' lengths. A rank holds consecutive tokens.
- ring: keys and values travel around the ranks, see :mod:`.ring`. It works for any number of heads. A rank holds two
  chunks of tokens.

Documents may extend across ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ...kernels.attention import AttentionPlan
from ..config.settings import ParallelConfig, TrainingConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.attention_choice import ContextKind, context_kind, heads_problem
from ..model.language_model import LanguageModel
from . import ring


def check(architecture: Architecture, config: ParallelConfig, training: TrainingConfig) -> None:
    """Refuse numbers that cannot be divided evenly among ``parallel.context`` ranks, and what a rank cannot know.

    Raises:
        UserError: with both sides of the division.
    """
    size, longest, sequence_length = config.context, architecture.longest_unscaled, training.sequence_length
    if size > 1 and longest is not None and sequence_length > longest:
        raise UserError(
            f"parallel.context {size} with training.sequence_length {sequence_length}: the rotary positions "
            f"of documents above {longest} tokens depend on their length, which ranks with a part of a document do not "
            f"know; set parallel.context to 1, training.sequence_length to at most {longest}, or model.rope"
        )
    if size == 1:
        return
    if context_kind(config, architecture) == "heads":
        problem = heads_problem(config, architecture)
        if problem is not None:
            raise UserError(f"{problem}; use a number that does, or set parallel.context_kind to auto or ring")
        return
    tokens = training.micro_batch_size * sequence_length
    if tokens % (2 * size):
        raise UserError(
            f"ring attention divides training.micro_batch_size {training.micro_batch_size} x training.sequence_length "
            f"{sequence_length} = {tokens} tokens into 2 x parallel.context {size} = {2 * size} equal chunks; use a "
            f"multiple of {2 * size}"
        )


def own_tokens(num_tokens: int, rank: int, ranks: int, kind: ContextKind) -> tuple[slice, ...]:
    """Return which of a micro-batch's tokens a context-parallel rank computes, in the order in which it holds them."""
    if kind == "ring":
        return ring.zigzag(num_tokens, rank, ranks)
    size = num_tokens // ranks
    return (slice(rank * size, (rank + 1) * size),)


def apply(model: LanguageModel, group: dist.ProcessGroup | None, kind: ContextKind) -> None:
    """Wrap the attention of every block; ``group`` is the ranks with the tokens of the same samples, in order."""
    if group is None:
        return
    if kind == "ring":
        model.wrap_attention(lambda _: functools.partial(_attend_in_a_ring, group))
    else:
        model.wrap_attention(lambda attend: functools.partial(_attend_to_all_tokens, attend, group))


def _attend_in_a_ring(
    group: dist.ProcessGroup,
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    plan: AttentionPlan,
    **options: Any,
) -> Tensor:
    """Map queries, keys and values of this rank's T tokens to [T, N, E]. The documents are those of ``plan``."""
    assert plan.offsets is not None
    return ring.ring_attention(q_TND, k_TKD, v_TKE, plan.offsets, group, plan.backend, **options)


def _attend_to_all_tokens(
    attend: Callable[..., Tensor],
    group: dist.ProcessGroup,
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    *arguments: Any,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Map queries, keys and values of this rank's T tokens, of all heads, to [T, N, E].

    If there are more ranks than key/value heads, each head goes to all ranks that have its queries. ``sinks`` are those
    of all N heads. Like that of other parameters, their gradient is a sum over ranks: each has it for its own heads.
    """
    copies = max(1, group.size() // k_TKD.shape[1])
    k_TKD, v_TKE = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (k_TKD, v_TKE))
    q, k, v = (_heads_for_tokens(x, group) for x in (q_TND, k_TKD, v_TKE))
    if sinks is not None:
        options["sinks"] = sinks.chunk(group.size())[group.rank()]
    return _tokens_for_heads(attend(q, k, v, *arguments, **options), group)


def _heads_for_tokens(x_TND: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Map [T, N, D] to [ranks * T, N / ranks, D]."""
    parts = x_TND.unflatten(1, (group.size(), -1)).transpose(0, 1)
    return _exchange(parts, group).flatten(0, 1)


def _tokens_for_heads(x_TND: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Map [ranks * T, N / ranks, D] to [T, N, D]."""
    parts = x_TND.unflatten(0, (group.size(), -1))
    return _exchange(parts, group).transpose(0, 1).flatten(1, 2)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange [ranks, ...]: send part i to rank i, and receive this rank's part of each."""
    return all_to_all_single_autograd(parts.contiguous(), None, None, group)
