"""Choose the most likely next tokens with the model in training, in any layout: to look at its texts, not to serve it.

There is no key/value cache: every token computes the whole sequence again, by the forward pass of an evaluation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.linear_cross_entropy import IGNORE_INDEX
from ..batch import Batch
from ..model.decoder import scaled_logits
from ..model.language_model import LanguageModel
from .forward_backward import ForwardBackward, ModelParts

_Chosen = list[tuple[Tensor, Tensor]]


def next_tokens(model: ModelParts, forward_backward: ForwardBackward, batches: list[Batch]) -> dict[int, int]:
    """Return the most likely tokens after some positions. All ranks must call this.

    Args:
        model: this rank's part.
        forward_backward: its passes.
        batches: whose ``targets`` are masked, except those of the positions: they hold the number of the position.

    Returns:
        the token of each number that this rank has computed: with context parallelism some of them, and in a pipeline
        none on ranks without the last block.
    """
    chosen: _Chosen = []
    with model.other_losses(lambda decoder: functools.partial(_choose, decoder, chosen)):
        forward_backward.evaluate(batches)
    return {
        number: token
        for numbers, tokens in chosen
        for number, token in zip(numbers.tolist(), tokens.tolist(), strict=True)
    }


def _choose(
    decoder: LanguageModel,
    chosen: _Chosen,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None,
) -> Tensor:
    numbers = targets_T[targets_T != IGNORE_INDEX]
    if len(numbers):
        chosen.append((numbers, decoder.next_tokens(hidden_TH, weight_VH, targets_T)))
    return hidden_TH.new_zeros((), dtype=torch.float32)


def most_likely_of_all_ranks(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, *, vocab_group: dist.ProcessGroup, **head_options: Any
) -> Tensor:
    """Compute :attr:`LanguageModel.next_tokens` on ranks that each hold the same number of rows of the head.

    Args:
        hidden_TH, targets_T: the same on all ranks.
        weight_VH: rows of this rank.
        vocab_group: the ranks, in the order of the rows.
        head_options: see :attr:`DecoderArchitecture.head_options`.
    """
    logits_NV = scaled_logits(hidden_TH[targets_T != IGNORE_INDEX], weight_VH, **head_options)
    highest_N, rows_N = logits_NV.float().max(-1)
    tokens_N = rows_N + dist.get_rank(vocab_group) * len(weight_VH)
    highest_RN, tokens_RN = (torch.stack(_all_gather(own, vocab_group)) for own in (highest_N, tokens_N))
    return tokens_RN.gather(0, highest_RN.argmax(0, keepdim=True))[0]


def _all_gather(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts
