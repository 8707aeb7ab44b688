"""Compute the loss of every token, in any layout: for evaluations of single documents, not for training."""

from __future__ import annotations

import functools

from torch import Tensor

from ..batch import Batch
from ..model.language_model import LanguageModel
from .forward_backward import ForwardBackward, ModelParts


def token_losses(model: ModelParts, forward_backward: ForwardBackward, batches: list[Batch]) -> list[Tensor]:
    """Return [T] fp32 losses of the tokens of each batch, zero where the target is masked. All ranks must call this.

    With context parallelism a rank gets the losses of its own tokens. All tensor-parallel ranks get the same. Ranks of
    a pipeline without the last block get an empty list.
    """
    losses: list[Tensor] = []
    with model.other_losses(lambda decoder: functools.partial(_sum_and_record, decoder, losses)):
        forward_backward.evaluate(batches)
    return losses[: len(batches)]  # a pipeline evaluates more, to fill its schedule


def _sum_and_record(
    decoder: LanguageModel,
    losses: list[Tensor],
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None,
) -> Tensor:
    assert weights_T is None
    losses.append(decoder.token_losses(hidden_TH, weight_VH, targets_T))
    return losses[-1].sum()
