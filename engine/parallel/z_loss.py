"""Sum the z-loss of the logits over the micro-batches of a step, for its metrics: ``training.z_loss``.

The loss of the head computes it in any case (:mod:`retemper.kernels.linear_cross_entropy`). Its sum stays on the device
until the step is reported, so no micro-batch waits for the host. Gradients are computed without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.settings import TrainingConfig
from ..model.language_model import LanguageModel


class ZLoss:
    """The z-losses of this rank's tokens in a step.

    Args:
        factor: ``training.z_loss``, which is above zero.
        device: of the model.
        counts: False on a rank whose tokens another rank counts: with tensor parallelism all have the same ones.
    """

    def __init__(self, factor: float, device: torch.device, counts: bool):
        self._factor, self._counts = factor, counts
        self._total = torch.zeros((), device=device)

    def begin_step(self) -> None:
        """Forget the micro-batches of the step before."""
        self._total.zero_()

    def add(self, z_loss_sum: Tensor) -> None:
        """Add the z-losses of a micro-batch, [] fp32 on the device, multiplied by the factor."""
        if self._counts:
            self._total += z_loss_sum

    def mean(self, num_targets: float) -> Tensor:
        """Return [] fp32 on the device: this rank's part of the mean of ``logsumexp(logits)^2``, without the factor.

        Args:
            num_targets: number of targets in the global batch, or the sum of their weights.
        """
        return self._total / (self._factor * num_targets)


def attach(
    decoders: Sequence[LanguageModel], training: TrainingConfig, device: torch.device, counts: bool
) -> ZLoss | None:
    """Let the decoder with the last block report its z-losses; return None without ``training.z_loss``.

    Every rank gets a :class:`ZLoss`, whose mean is zero if another rank has the last block.

    Args:
        decoders: of this rank.
        training: with the factor.
        device: of the model.
        counts: see :class:`ZLoss`.
    """
    if training.z_loss == 0:
        return None
    z_loss = ZLoss(training.z_loss, device, counts)
    for decoder in decoders:
        decoder.on_z_loss = z_loss.add
    return z_loss
