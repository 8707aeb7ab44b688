"""Linear cross-entropy with whole logits and autograd, as the reference in tests."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import IGNORE_INDEX, LinearCrossEntropy


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    weights_T: Tensor | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> LinearCrossEntropy:
    """Compute the same as :func:`retemper.kernels.linear_cross_entropy.linear_cross_entropy`, in the inputs' dtype.

    Use float64 for an oracle. All logits are in memory, and the whole vocabulary is on this rank.
    """
    assert vocab_group is None, "the reference takes the whole weight"
    logits_TV = hidden_TH @ weight_VH.t()
    if bias is not None:
        logits_TV = logits_TV + bias
    logits_TV = logits_TV * logit_scale
    if logit_softcap is not None:
        logits_TV = logit_softcap * torch.tanh(logits_TV / logit_softcap)
    losses_T = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE_INDEX, reduction="none")
    valid_T = targets_T != IGNORE_INDEX
    z_losses_T = z_loss * torch.logsumexp(logits_TV, dim=-1).square() * valid_T
    if weights_T is not None:
        losses_T, z_losses_T = losses_T * weights_T, z_losses_T * weights_T
    return LinearCrossEntropy((losses_T + z_losses_T).sum(), valid_T.sum(), z_losses_T.sum().detach())
