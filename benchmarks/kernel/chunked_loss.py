"""Cross-entropy of a linear head over a fixed number of chunks of the sequence, as in torchtitan.

Reimplemented from the idea (torchtitan's ``ChunkedLossWrapper`` with its default of 8 chunks), only for comparison.
Each chunk computes its logits, its loss and its backward pass before the next one begins. The weight's gradient is
accumulated in the weight's dtype, as by ``.grad`` there; the chunks' gradients of the hidden states are concatenated.
Its handling of parallel layouts is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .references import IGNORE_INDEX

NUM_CHUNKS = 8
ChunkLoss = Callable[[Tensor, Tensor], Tensor]


def sum_of_losses(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the sum of the losses of one chunk, in fp32; torchtitan can compile this function."""
    return F.cross_entropy(logits_TV.float(), targets_T, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk_loss: ChunkLoss = sum_of_losses
) -> Tensor:
    """Return the mean loss of the targets that are not -100, [] fp32, with gradients of both matrices.

    Args:
        hidden_TH: [T, H]; T need not be a multiple of the number of chunks.
        weight_VH: [V, H].
        targets_T: [T] int64.
        chunk_loss: ``sum_of_losses``, compiled or not.
    """
    return _ChunkedCrossEntropy.apply(hidden_TH, weight_VH, targets_T, chunk_loss)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes all gradients in the forward pass; the backward pass only returns them."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk_loss: ChunkLoss) -> Tensor:
        count = (targets_T != IGNORE_INDEX).sum()
        loss = torch.zeros((), device=hidden_TH.device)
        gradient_TH = torch.empty_like(hidden_TH, dtype=torch.float32)
        weight = weight_VH.detach().requires_grad_()
        rows = zip(hidden_TH.chunk(NUM_CHUNKS), targets_T.chunk(NUM_CHUNKS), gradient_TH.chunk(NUM_CHUNKS), strict=True)
        for hidden, targets, gradient in rows:
            leaf = hidden.detach().requires_grad_()
            with torch.enable_grad():
                part = chunk_loss(F.linear(leaf, weight), targets) / count
                part.backward()
            assert leaf.grad is not None
            gradient.copy_(leaf.grad)
            loss += part.detach()
        ctx.save_for_backward(gradient_TH.to(hidden_TH.dtype), weight.grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_of_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight = ctx.saved_tensors
        return hidden * gradient_of_loss, weight * gradient_of_loss, None, None
