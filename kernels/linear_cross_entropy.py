"""Cross-entropy of a linear head without ever holding all logits.

The head's product, the softmax and both gradients are computed for a few rows at a time, so the logits take no more
than ``LOGIT_BYTES`` however many tokens there are; the weight's gradient is accumulated in fp32. Gradients are formed
in the forward pass (three matrix products, none repeated) and scaled by the incoming gradient in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a token that has none: it adds no loss and no gradient."""

LOGIT_BYTES = 256 * 1024**2
"""Memory budget of one chunk of fp32 logits, in bytes."""


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of ``-log softmax(hidden @ weight.T)[target]``; targets of ``IGNORE_INDEX`` count nothing.

    Logits and the accumulation of both gradients are fp32 for any input dtype.

    Args:
        hidden_TH: [T, H] fp32 or bf16.
        weight_VH: [V, H] of the same dtype.
        targets_T: [T] int64 in [0, V), or ``IGNORE_INDEX``.

    Returns:
        [] fp32, the sum of the losses.
    """
    need_hidden = torch.is_grad_enabled() and hidden_TH.requires_grad
    need_weight = torch.is_grad_enabled() and weight_VH.requires_grad
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, targets_T, need_hidden, need_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, need_hidden, need_weight):
        # Whether gradients are needed is decided by the caller: inside forward, grad mode is always off.
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, LOGIT_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = _matmul_fp32(hidden[part], weight.t())
            valid = targets[part] != IGNORE_INDEX
            target = torch.where(valid, targets[part], 0)[:, None]
            log_sum = torch.logsumexp(logits, dim=-1)
            loss += ((log_sum - logits.gather(1, target)[:, 0]) * valid).sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax - onehot, computed in the logits' own memory.
            grad = logits.sub_(log_sum[:, None]).exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad.mul_(valid[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += _matmul_fp32(grad.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else _scaled(grad_hidden, grad_loss, grad_hidden.dtype),
            None if grad_weight is None else _scaled(grad_weight, grad_loss, ctx.weight_dtype),
            None,
            None,
            None,
        )


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` rounded once, to ``dtype``: a bf16 factor would bend all gradients of a step by up to 0.4 %."""
    # One element instead of none makes the product fp32; it is rounded as it is written.
    return torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad, dtype=dtype))


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with an fp32 result that was never rounded to the inputs' dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
