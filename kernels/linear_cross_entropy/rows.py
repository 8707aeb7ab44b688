"""Shared parts of both backends: the mathematics of one row of logits, vocabulary-parallel statistics, fp32 products.

For one token with logits ``z[V]``, log-sum-exp ``lse`` and target ``y``

    loss   = lse - z[y] + z_loss * lse^2
    dz[v]  = p[v] * (1 + 2 * z_loss * lse) - [v == y],    p = exp(z - lse)

with the z-loss of PaLM (Chowdhery et al., 2022, section 5).
With a scale ``s`` and a bias ``b``, ``z = s * (x + b)`` of the product ``x``, ``dx = s * dz`` and ``db`` is the sum of
``dx`` over tokens. With a soft cap (Gemma 2), ``z = cap * tanh(s * (x + b) / cap)``, and ``dx = s * dz * (1 - (z /
cap)^2)``.

A token's weight multiplies its loss and all its gradients.

Shapes: T tokens (a chunk of them here), V rows of the weight on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a token without target: it adds no loss and no gradient."""


class Options(NamedTuple):
    """The keyword arguments of :func:`linear_cross_entropy` that both backends read."""

    z_loss: float = 0.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    vocab_group: dist.ProcessGroup | None = None


class Needs(NamedTuple):
    """The inputs whose gradients are requested."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """The result of a backend."""

    losses_T: Tensor
    """[T] fp32, times the tokens' weights; zero if the target is ignored."""
    z_losses_T: Tensor
    """[T] fp32, the z-losses that they contain."""
    hidden_TH: Tensor | None
    """[T, H] in the hidden states' dtype, or fp32 for fp16: gradient of the summed loss; None if not requested."""
    weight_VH: Tensor | None
    """[V, H] fp32; None if not requested."""
    bias_V: Tensor | None
    """[V] fp32; None if not requested."""


class Targets(NamedTuple):
    """The targets of a chunk, from the view of one rank of the vocabulary group."""

    weights_T: Tensor
    """[T] fp32, 0 where the target is ignored, else the token's weight, usually 1."""
    index_T: Tensor
    """[T] int64 row of the target in this rank's weight, 0 if another rank has it."""
    owned_T: Tensor
    """[T] fp32, 1 where ``index_T`` is the target, else 0."""
    lost_T: Tensor
    """[T] bool, true if no rank has this target: neither a token id nor ``IGNORE_INDEX``."""

    @staticmethod
    def of(targets_T: Tensor, num_rows: int, options: Options, weights_T: Tensor | None = None) -> Targets:
        """Return the targets as this rank sees them.

        Args:
            targets_T: [T] int64.
            num_rows: V of this rank.
            weights_T: [T] fp32 weights of the tokens; None: all are 1.
        """
        valid = targets_T != IGNORE_INDEX
        local = targets_T - group_rank(options) * num_rows
        owned = valid & (local >= 0) & (local < num_rows)
        lost = valid & ((targets_T < 0) | (targets_T >= num_rows * group_size(options)))
        weights = valid.float() if weights_T is None else torch.where(valid, weights_T, 0.0)
        return Targets(weights, torch.where(owned, local, 0), owned.float(), lost)


class RowTerms(NamedTuple):
    """The loss of each row, and the values that its gradient needs."""

    losses_T: Tensor
    """[T] fp32, with the z-losses."""
    z_losses_T: Tensor
    """[T] fp32."""
    log_sum_T: Tensor
    """[T] fp32 log-sum-exp over the whole vocabulary."""
    slope_T: Tensor
    """[T] fp32 ``1 + 2 * z_loss * lse``: derivative of a row's loss by its log-sum-exp, 1 without a z-loss."""


def row_terms(log_sum_T: Tensor, target_logit_T: Tensor, targets: Targets, options: Options) -> RowTerms:
    """Return the losses from this rank's statistics, which the ranks of a vocabulary group exchange here.

    Args:
        log_sum_T: [T] fp32 log-sum-exp over this rank's rows.
        target_logit_T: [T] fp32 logit of the target, 0 where another rank has it.
        targets: of these tokens.
        options: of the whole loss.
    """
    if options.vocab_group is not None:
        # All-gather and not all-reduce: every rank then adds the same numbers in the same order.
        local = torch.stack((log_sum_T, target_logit_T))
        gathered = local.new_empty(group_size(options), *local.shape)
        dist.all_gather_into_tensor(gathered.view(-1, local.shape[-1]), local, group=options.vocab_group)
        log_sum_T = torch.logsumexp(gathered[:, 0], dim=0)
        target_logit_T = gathered[:, 1].sum(0)
    losses = log_sum_T - target_logit_T
    slope, z_losses = torch.ones_like(log_sum_T), torch.zeros_like(log_sum_T)
    if options.z_loss:
        z_losses = options.z_loss * log_sum_T.square() * targets.weights_T
        slope += (2.0 * options.z_loss) * log_sum_T
    # A wrong target must not give a plausible loss; a check that raises would wait for the device.
    losses = (losses * targets.weights_T + z_losses).masked_fill_(targets.lost_T, float("nan"))
    return RowTerms(losses, z_losses, log_sum_T, slope)


def group_size(options: Options) -> int:
    """Return the number of ranks that share the vocabulary."""
    return 1 if options.vocab_group is None else dist.get_world_size(options.vocab_group)


def group_rank(options: Options) -> int:
    """Return this rank's place among them."""
    return 0 if options.vocab_group is None else dist.get_rank(options.vocab_group)


def chunks(num_tokens: int, rows: int, multiple: int = 1) -> list[slice]:
    """Divide ``num_tokens`` into as few chunks of at most ``rows`` as possible, of nearly equal sizes.

    The sizes are multiples of ``multiple``, as ``rows`` is.
    """
    if num_tokens == 0:
        return []
    count = -(-num_tokens // max(1, rows))
    size = -(-num_tokens // (count * multiple)) * multiple
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` with an fp32 result that was never rounded to the inputs' dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a @ b`` in fp32, in the memory of ``total``; None counts as zero."""
    if total is None:
        return matmul_fp32(a, b)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if a.is_cuda:
        return add_product_in_place(total, a, b)
    return total.add_(matmul_fp32(a, b))


def add_product_in_place(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the product of two bf16 matrices to the fp32 matrix ``total`` on a GPU.

    This is one cuBLAS product with beta = 1, which reads and writes ``total`` once. addmm cannot do it before PyTorch
    2.12, where its first argument must have the dtype of the factors; baddbmm has no such check.
    """
    batch = total[None]
    torch.baddbmm(batch, a[None], b[None], out_dtype=torch.float32, out=batch)
    return total
