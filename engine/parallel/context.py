"""Context parallelism: ranks share the tokens of the same samples; during attention they share heads instead.

Every rank computes everything but attention for its own consecutive tokens. Around attention two exchanges
turn "all heads of some tokens" into "some heads of all tokens" and back (Jacobs et al., 2023,
https://arxiv.org/abs/2309.14509). So any attention backend works unchanged, documents may extend across ranks, and all
ranks do the same work, whatever the documents' lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ..config.settings import ParallelConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.language_model import LanguageModel


def check(architecture: Architecture, config: ParallelConfig, sequence_length: int) -> None:
    """Refuse numbers that cannot be divided evenly among ``parallel.context`` ranks, and what a rank cannot know.

    Raises:
        UserError: with both sides of the division.
    """
    longest = architecture.longest_unscaled
    if config.context > 1 and longest is not None and sequence_length > longest:
        raise UserError(
            f"parallel.context {config.context} with training.sequence_length {sequence_length}: the rotary positions "
            f"of documents above {longest} tokens depend on their length, which ranks with a part of a document do not "
            f"know; set parallel.context to 1, training.sequence_length to at most {longest}, or model.rope"
        )
    size, tensor = config.context, config.tensor
    heads, kv_heads = architecture.num_attention_heads // tensor, architecture.num_key_value_heads // tensor
    share = f" / parallel.tensor {tensor}" if tensor > 1 else ""
    if heads % size:
        raise UserError(
            f"parallel.context {size} does not divide the {heads} attention heads of a rank "
            f"({architecture.num_attention_heads}{share}); use a divisor of {heads}"
        )
    if kv_heads % size and size % kv_heads:
        raise UserError(
            f"parallel.context {size} neither divides the {kv_heads} key/value heads of a rank "
            f"({architecture.num_key_value_heads}{share}) nor is a multiple of them; use a number that does"
        )


def apply(model: LanguageModel, group: dist.ProcessGroup | None) -> None:
    """Wrap the attention of every block; ``group`` is the ranks with the tokens of the same samples, in order."""
    if group is None:
        return
    model.wrap_attention(lambda attend: functools.partial(_attend_to_all_tokens, attend, group))


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
