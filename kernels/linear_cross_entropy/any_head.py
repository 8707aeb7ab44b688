"""Cross-entropy of an output head that is any function, with a bounded number of logits in memory.

:func:`linear_cross_entropy` is faster and more exact, so this is only for heads that are not a matrix with a bias, a
scale and a soft cap. The head is evaluated for some rows at a time, and once more in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import IGNORE_INDEX, LinearCrossEntropy
from .rows import Options, RowTerms, Targets, chunks, row_terms

LOGIT_BYTES = 1024**3
"""Memory budget in bytes of one chunk's logits and all else of their shape. Few large chunks are better than many small
ones, because each has a whole gradient of the head's parameters, which is added to the sum in their dtype."""

BYTES_PER_LOGIT = 18
"""Maximum memory of one logit in the backward pass: itself, its fp32 copy, and the gradients of the two terms."""


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden_TH: Tensor,
    targets_T: Tensor,
    vocab_size: int,
    *,
    weights_T: Tensor | None = None,
    z_loss: float = 0.0,
    budget: int = LOGIT_BYTES,
) -> LinearCrossEntropy:
    """Return the sum over tokens of ``-log softmax(head(hidden))[target]``.

    Softmax and losses are fp32. Gradients flow to the hidden states and to all parameters that ``head`` uses. The
    gradient of a parameter is accumulated over chunks in the parameter's dtype.

    Args:
        head: maps [n, H] hidden states to [n, V] logits, each row from its own hidden state only. It is called twice
            for each chunk.
        hidden_TH: [T, H].
        targets_T: [T] int64 in [0, V), or ``IGNORE_INDEX``. Any other target makes the loss NaN.
        vocab_size: V.
        weights_T: [T] fp32 factors of the tokens' losses and gradients, z-losses included; None: all are 1.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to each token's loss.
        budget: bytes for the logits and all else of their shape. At least one row is always processed.
    """
    chunk_loss = functools.partial(_chunk_loss, head, Options(z_loss))
    loss_sum, z_loss_sum = torch.zeros(2, dtype=torch.float32, device=hidden_TH.device)
    # Without tokens the head is still evaluated, so that its parameters have a gradient.
    for part in chunks(hidden_TH.shape[0], budget // (BYTES_PER_LOGIT * vocab_size)) or [slice(0, 0)]:
        weights = None if weights_T is None else weights_T[part]
        loss, z_loss_of_chunk = checkpoint(chunk_loss, hidden_TH[part], targets_T[part], weights, use_reentrant=False)
        loss_sum, z_loss_sum = loss_sum + loss, z_loss_sum + z_loss_of_chunk.detach()
    return LinearCrossEntropy(loss_sum, (targets_T != IGNORE_INDEX).sum(), z_loss_sum)


@torch.no_grad()
def chunked_token_losses(
    head: Callable[[Tensor], Tensor],
    hidden_TH: Tensor,
    targets_T: Tensor,
    vocab_size: int,
    *,
    budget: int = LOGIT_BYTES,
) -> Tensor:
    """Return [T] fp32: the terms of the sum of :func:`chunked_cross_entropy`, without gradients. Ignored ones are zero.

    The arguments are those of that function.
    """
    parts = chunks(hidden_TH.shape[0], budget // (BYTES_PER_LOGIT * vocab_size)) or [slice(0, 0)]
    options = Options()
    return torch.cat([_chunk_terms(head, options, hidden_TH[part], targets_T[part]).losses_T for part in parts])


def _chunk_loss(
    head: Callable[[Tensor], Tensor], options: Options, hidden_TH: Tensor, targets_T: Tensor, weights_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    terms = _chunk_terms(head, options, hidden_TH, targets_T, weights_T)
    return terms.losses_T.sum(), terms.z_losses_T.sum()


def _chunk_terms(
    head: Callable[[Tensor], Tensor],
    options: Options,
    hidden_TH: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
) -> RowTerms:
    logits = head(hidden_TH).float()
    targets = Targets.of(targets_T, logits.shape[1], options, weights_T)
    target_logit = logits.gather(1, targets.index_T[:, None])[:, 0] * targets.owned_T
    return row_terms(logits.logsumexp(1), target_logit, targets, options)
