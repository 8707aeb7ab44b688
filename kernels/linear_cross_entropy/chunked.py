"""Linear cross-entropy in plain PyTorch: any dtype, any device, a few rows of logits at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Gradients, Needs, Options, Targets, add_product, chunks, matmul_fp32, row_terms

FP16_SCALE = 2.0**12
"""Factor of the logits' gradients in products of fp16 matrices on a GPU. Their magnitude is at most about 1, and most
are far below fp16's smallest normal number, 6e-5."""

CACHED_BYTES = 8 * 1024**2
"""Logits on which a CPU performs all elementwise operations before it goes on to the next rows."""


def bytes_per_logit(dtype: torch.dtype, is_cuda: bool, needs_gradients: bool, softcap: bool) -> int:
    """Return the maximum memory of one logit: its fp32 value, its tanh' and its gradient in the dtype of the
    products.
    """
    copy = 2 if needs_gradients and is_cuda and dtype != torch.float32 else 0
    return 4 + copy + (4 if needs_gradients and softcap else 0)


def compute(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    options: Options,
    budget: int,
    needs: Needs,
    weights_T: Tensor | None = None,
) -> Gradients:
    """Compute losses and the gradients of their sum; see :func:`linear_cross_entropy` for shapes and options.

    Args:
        budget: bytes for the logits and all else of their shape. At least one row is always processed.
    """
    num_rows = weight_VH.shape[0]
    losses, z_losses = torch.empty(2, hidden_TH.shape[0], dtype=torch.float32, device=hidden_TH.device)
    # The gradient of an fp16 tensor is rounded only after it is multiplied by the scale of the loss.
    grad_dtype = torch.float32 if hidden_TH.dtype == torch.float16 else hidden_TH.dtype
    grad_hidden = torch.empty_like(hidden_TH, dtype=grad_dtype) if needs.hidden else None
    grad_weight: Tensor | None = None
    grad_bias = torch.zeros(num_rows, dtype=torch.float32, device=hidden_TH.device) if needs.bias else None
    weight = weight_VH.to(product_dtype(weight_VH))
    in_fp16 = weight.dtype == torch.float16
    softcap = options.logit_softcap is not None
    per_logit = bytes_per_logit(hidden_TH.dtype, hidden_TH.is_cuda, any(needs), softcap)
    parts = chunks(hidden_TH.shape[0], budget // (per_logit * num_rows))
    memory: Tensor | None = None
    if parts and weight.dtype == torch.float32:
        # One allocation for all chunks: on a CPU the first use of new memory takes as long as a pass over it.
        memory = torch.empty(parts[0].stop, num_rows, dtype=torch.float32, device=weight.device)
    for part in parts:
        hidden = hidden_TH[part].to(weight.dtype)
        targets = Targets.of(targets_T[part], num_rows, options, None if weights_T is None else weights_T[part])
        grad = _logits(hidden, weight, memory)
        for block in _blocks(grad):
            of_block = Targets(*(values[block] for values in targets))
            of_rows = _rows(grad[block], bias_V, of_block, options, any(needs))
            losses[part][block], z_losses[part][block] = of_rows
        if not any(needs):
            continue
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        grad = (grad.mul_(FP16_SCALE) if in_fp16 else grad).to(weight.dtype)
        if grad_hidden is not None:
            if options.vocab_group is None and grad.dtype == grad_hidden.dtype:
                torch.mm(grad, weight, out=grad_hidden[part])
            else:
                whole = matmul_fp32(grad, weight)
                if options.vocab_group is not None:
                    dist.all_reduce(whole, group=options.vocab_group)
                grad_hidden[part] = whole / FP16_SCALE if in_fp16 else whole
        if needs.weight:
            grad_weight = add_product(grad_weight, grad.t(), hidden)
        # Freed before the next chunk's logits are allocated.
        del grad
    if needs.weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
    elif grad_weight is not None and in_fp16:
        grad_weight.div_(FP16_SCALE)
    return Gradients(losses, z_losses, grad_hidden, grad_weight, grad_bias)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the factors of all products with a head of this weight.

    Products accumulate in fp32 on CUDA; elsewhere only with fp32 factors, which are converted once.
    """
    return weight.dtype if weight.is_cuda else torch.float32


def _logits(hidden: Tensor, weight: Tensor, memory: Tensor | None) -> Tensor:
    """Return the fp32 product ``hidden @ weight.T``, in the first rows of ``memory`` if that is given."""
    if memory is None:
        return matmul_fp32(hidden, weight.t())
    return torch.mm(hidden, weight.t(), out=memory[: hidden.shape[0]])


def _blocks(logits: Tensor) -> list[slice]:
    """Return ranges of rows that are processed one after the other: all on a GPU, those that fit a CPU's cache."""
    num_rows, width = logits.shape
    return [slice(0, num_rows)] if logits.is_cuda else chunks(num_rows, CACHED_BYTES // (4 * width))


def _rows(
    logits: Tensor, bias: Tensor | None, targets: Targets, options: Options, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return losses [T] and their z-losses of fp32 products [T, V], which their gradient by the products replaces if
    it is needed.
    """
    if bias is not None:
        logits.add_(bias)
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    cap = options.logit_softcap
    cap_slope: Tensor | None = None
    if cap is not None:
        logits.div_(cap).tanh_()
        if need_gradient:
            cap_slope = torch.square(logits).neg_().add_(1.0)
        logits.mul_(cap)
    index = targets.index_T[:, None]
    target_logit = logits.gather(1, index)[:, 0] * targets.owned_T
    largest = logits.amax(1)
    # Written out: logsumexp would allocate another matrix of this shape.
    exponentials = logits.sub_(largest[:, None]).exp_()
    log_sum = largest + exponentials.sum(1).log_()
    terms = row_terms(log_sum, target_logit, targets, options)
    if not need_gradient:
        return terms.losses_T, terms.z_losses_T
    factor = targets.weights_T * terms.slope_T * torch.exp(largest - terms.log_sum_T) * options.logit_scale
    grad = exponentials.mul_(factor[:, None])
    grad.scatter_(
        1, index, grad.gather(1, index) - (targets.owned_T * targets.weights_T * options.logit_scale)[:, None]
    )
    if cap_slope is not None:
        grad.mul_(cap_slope)
    return terms.losses_T, terms.z_losses_T
