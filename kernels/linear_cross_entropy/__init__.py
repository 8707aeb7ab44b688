"""Cross-entropy of a linear head without holding all logits in memory.

The head's product, the softmax and both gradients are computed for some rows at a time. So the logits need no more than
a memory budget, however many tokens there are; the weight's gradient is accumulated in fp32. Gradients are formed in
the forward pass (three matrix products, none repeated) and scaled by the incoming gradient in the backward pass.

``chunked.py`` does this in PyTorch, ``triton_loss.py`` in Triton, ``reference.py`` has whole logits and autograd;
``rows.py`` has the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..triton_support import triton_refusal
from . import chunked
from .rows import IGNORE_INDEX, Gradients, Needs, Options

LOGIT_BYTES = 256 * 1024**2
"""Memory budget in bytes of one chunk's logits and all else of their shape, in the PyTorch path on a GPU."""

CPU_LOGIT_BYTES = 64 * 1024**2
"""The same on a CPU. Smaller chunks have slower products; larger ones take memory that is not in any cache."""

LARGEST_TRITON_BUDGET = 5 * 1024**3
"""Largest budget of the Triton path: one chunk for 16,384 tokens and a vocabulary of 152,064. Each further chunk reads
and writes the weight's fp32 gradient once more, and its products have fewer rows."""

SHARE_OF_MEMORY = 20
"""The Triton path's budget is at most this fraction (1/20) of a GPU's memory: 4 GiB of 80."""

INTERPRETER_BUDGET = 1024**3

BACKENDS = ("auto", "chunked", "triton", "triton-persistent")

Compute = Callable[..., Gradients]


def triton_budget(total_memory: int | None) -> int:
    """Return the memory budget in bytes of one chunk's exponentials and row statistics in the Triton path.

    Args:
        total_memory: of the GPU; None: Triton's interpreter.
    """
    if total_memory is None:
        return INTERPRETER_BUDGET
    return min(LARGEST_TRITON_BUDGET, total_memory // SHARE_OF_MEMORY)


class LinearCrossEntropy(NamedTuple):
    """Result of :func:`linear_cross_entropy`."""

    loss_sum: Tensor
    """[] fp32, sum of the tokens' losses; has a gradient."""
    count: Tensor  # type: ignore[assignment]  # hides the unused tuple.count
    """[] int64, number of targets that are not ignored. On the device: no host waits for it."""
    z_loss_sum: Tensor
    """[] fp32, the z-losses in ``loss_sum``; without a gradient."""

    @property
    def cross_entropy_sum(self) -> Tensor:
        """Return [] fp32: the loss without its z-losses, but with the gradient of both, as a training run needs it."""
        return self.loss_sum - self.z_loss_sum


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
    backend: str = "auto",
) -> LinearCrossEntropy:
    """Return the sum over tokens of ``-log softmax(hidden @ weight.T)[target]``, with options for language-model
    training.

    Logits and the accumulation of both gradients are fp32 for any input dtype. The same inputs give the same bits.

    Args:
        hidden_TH: [T, H] fp32, bf16 or fp16.
        weight_VH: [V, H] of the same dtype.
        targets_T: [T] int64 in [0, V), or ``IGNORE_INDEX``. Any other target makes the loss NaN.
        weights_T: [T] fp32 factors of the tokens' losses and gradients, z-losses included; None: all are 1.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to each token's loss, which keeps logits small (PaLM: Chowdhery
            et al., 2022, https://arxiv.org/abs/2204.02311).
        logit_softcap: replaces logits ``x`` by ``cap * tanh(x / cap)``.
        logit_scale: multiplies the fp32 logits, after the bias and before the soft cap.
        bias: [V] of the head; of any floating-point dtype, which its gradient has too.
        vocab_group: ranks that share the vocabulary. ``weight_VH`` and ``bias`` hold this rank's rows, as many on every
            rank and in the order of ranks; hidden states, targets (rows of the whole vocabulary) and whether gradients
            are needed are the same on all. Every rank gets the whole loss and the whole gradient of the hidden states.
        backend: "auto" takes Triton on CUDA for what it supports, and of its kernels the persistent one where that can
            read the inputs (``triton_kernels.py``); "chunked", "triton" and "triton-persistent" force one.

    Raises:
        ValueError: unknown backend, or one that does not support this.
    """
    options = Options(z_loss, logit_softcap, logit_scale, vocab_group)
    compute = functools.partial(_choose(backend, hidden_TH, weight_VH), weights_T=weights_T)
    tensors = hidden_TH, weight_VH, bias
    needs = Needs(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors))
    loss_sum, z_loss_sum = _LinearCrossEntropy.apply(*tensors, targets_T, options, compute, needs)
    return LinearCrossEntropy(loss_sum, (targets_T != IGNORE_INDEX).sum(), z_loss_sum)


@torch.no_grad()
def token_losses(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return [T] fp32: the terms of the sum of :func:`linear_cross_entropy`, without gradients. Ignored ones are zero.

    The arguments are those of that function. Every rank of ``vocab_group`` gets all terms.

    Raises:
        ValueError: unknown backend, or one that does not support this.
    """
    options = Options(0.0, logit_softcap, logit_scale, vocab_group)
    compute = _choose(backend, hidden_TH, weight_VH)
    return compute(hidden_TH, weight_VH, bias, targets_T, options, needs=Needs(False, False, False)).losses_T


def backend_refusal(backend: str, hidden_TH: Tensor, weight_VH: Tensor) -> str | None:
    """Return why a backend cannot compute this, with the remedy; None if it can."""
    if not backend.startswith("triton"):
        return None
    if hidden_TH.dtype != torch.bfloat16:
        stored = f"it stores exponentials as bf16, which would round the gradients of {hidden_TH.dtype} inputs"
        return f"{stored}; use 'chunked'"
    missing = triton_refusal(hidden_TH.device.type)
    if missing is not None or backend == "triton":
        return None if missing is None else f"{missing}, or 'chunked'"
    from .triton_kernels import descriptor_refusal

    refusal = descriptor_refusal(hidden_TH, weight_VH)
    return None if refusal is None else f"{refusal}; use 'triton'"


def default_backend(hidden_TH: Tensor, weight_VH: Tensor) -> str:
    """Return the backend that "auto" takes. The first call on a GPU checks the persistent kernel there."""
    order = ("triton-persistent", "triton", "chunked") if hidden_TH.is_cuda else ("chunked",)
    backend = next(one for one in order if backend_refusal(one, hidden_TH, weight_VH) is None)
    if backend == "triton-persistent":
        from .self_check import persistent_problem

        return backend if persistent_problem(hidden_TH.device, hidden_TH.shape[1]) is None else "triton"
    return backend


def _choose(backend: str, hidden_TH: Tensor, weight_VH: Tensor) -> Compute:
    """Return the function of a backend, with its memory budget."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = default_backend(hidden_TH, weight_VH)
    refusal = backend_refusal(backend, hidden_TH, weight_VH)
    if refusal is not None:
        raise ValueError(f"backend {backend!r} cannot be used: {refusal}")
    if backend == "chunked":
        return functools.partial(chunked.compute, budget=logit_budget(hidden_TH.device))
    from . import triton_loss

    budget, persistent = device_budget(hidden_TH.device), backend == "triton-persistent"
    return functools.partial(triton_loss.compute, budget=budget, persistent=persistent)


def logit_budget(device: torch.device) -> int:
    """Return the budget of the PyTorch path on a device."""
    return CPU_LOGIT_BYTES if device.type == "cpu" else LOGIT_BYTES


def device_budget(device: torch.device) -> int:
    """Return :func:`triton_budget` of a device. PyTorch reads a GPU's properties once."""
    is_gpu = device.type == "cuda"
    return triton_budget(torch.cuda.get_device_properties(device).total_memory if is_gpu else None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options, compute, needs):
        # The caller decides whether gradients are needed: inside forward, grad mode is always off.
        assert hidden.dtype == weight.dtype, f"hidden states {hidden.dtype}, weight {weight.dtype}"
        result = compute(hidden, weight, bias, targets, options, needs=needs)
        ctx.save_for_backward(result.hidden_TH, result.weight_VH, result.bias_V)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        z_loss_sum = result.z_losses_T.sum()
        ctx.mark_non_differentiable(z_loss_sum)
        return result.losses_T.sum(), z_loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        gradients = (
            None if grad is None else _scaled(grad, grad_loss, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, *(None,) * 4)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad * factor`` rounded once, to ``dtype``: a bf16 factor would change all gradients of a step by up to
    0.4 %. A gradient of that dtype is scaled in its own memory, unless the graph is kept for a second backward pass:
    zero-bubble pipelines make one for the gradients of weights.
    """
    in_place = grad.dtype == dtype and not torch._C._autograd._get_current_graph_task_keep_graph()
    result = grad if in_place else torch.empty_like(grad, dtype=dtype)
    # One element instead of zero dimensions makes the product fp32; it is rounded when it is written.
    return torch.mul(grad, factor.reshape(1), out=result)
