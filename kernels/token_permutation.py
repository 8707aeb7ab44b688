"""Sort tokens by the experts that they are routed to, and sum what the experts return.

Both directions gather rows, and their gradients gather rows as well. Nothing is added atomically, so that results are
the same in every run, and nothing waits for the device.

Shapes: T tokens, K experts of a token, R = T * K rows, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RowOrder(NamedTuple):
    """The rows of all experts: one for each token and each of its experts, sorted by expert, then by token."""

    choices_R: Tensor
    """[R] int64: the number of each row's choice among the flattened [T, K] choices."""
    rows_TK: Tensor
    """[T, K] int64: the row of each choice."""
    counts_E: Tensor
    """[E] int32: number of rows of each expert."""

    @property
    def tokens_R(self) -> Tensor:
        """[R] int64: the token of each row."""
        return self.choices_R // self.rows_TK.shape[1]

    @property
    def ends_E(self) -> Tensor:
        """[E] int32: where the rows of each expert end."""
        return self.counts_E.cumsum(0, dtype=torch.int32)


def order_by_expert(experts_TK: Tensor, num_experts: int) -> RowOrder:
    """Return the order of the rows for [T, K] int64 choices of experts."""
    choices_R = experts_TK.flatten()
    order_R = choices_R.argsort(stable=True)
    rows_R = torch.empty_like(order_R)
    rows_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return RowOrder(order_R, rows_R.view_as(experts_TK), count(choices_R, num_experts))


def count(numbers_N: Tensor, length: int) -> Tensor:
    """Return [length] int32: how often each number below ``length`` occurs in [N] int64. Waits for no device, unlike
    ``torch.bincount``.
    """
    counts = torch.zeros(length, dtype=torch.int32, device=numbers_N.device)
    return counts.scatter_add_(0, numbers_N, torch.ones_like(numbers_N, dtype=torch.int32))


def expand(x_TH: Tensor, order: RowOrder) -> Tensor:
    """Return [R, H]: the hidden states of the token of each row."""
    return _Expand.apply(x_TH, order.tokens_R, order.rows_TK)


def weights_of_rows(weights_TK: Tensor, order: RowOrder) -> Tensor:
    """Return [R]: the weight of each row, of [T, K] weights of the choices."""
    return _Permute.apply(weights_TK.flatten(), order.choices_R, order.rows_TK.flatten())


def sort_rows(x_R: Tensor, order: RowOrder) -> Tensor:
    """Return [R, ...]: rows of one expert each, in the ``order`` of their [R, 1] choices."""
    return _Permute.apply(x_R, order.choices_R, order.rows_TK.flatten())


def unsort_rows(x_R: Tensor, order: RowOrder) -> Tensor:
    """Return [R, ...]: undo :func:`sort_rows`."""
    return _Permute.apply(x_R, order.rows_TK.flatten(), order.choices_R)


def combine(y_RH: Tensor, order: RowOrder) -> Tensor:
    """Return [T, H]: the sum of the rows of each token."""
    return _Combine.apply(y_RH, order.tokens_R, order.rows_TK)


def _sum_of_rows(rows_RH: Tensor, rows_TK: Tensor) -> Tensor:
    """Return [T, H] without an intermediate [T, K, H]. Rows are added in the order of the choices."""
    return F.embedding_bag(rows_TK, rows_RH, mode="sum")


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return x_TH[tokens_R]

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        return _sum_of_rows(grad_RH, rows_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, tokens_R: Tensor, rows_TK: Tensor) -> Tensor:
        # Recomputation (torch.utils.checkpoint) ends with the last saved tensor. This one is small, and kept without
        # being saved, so that the product that made ``y_RH`` is not repeated for it.
        ctx.tokens_R = tokens_R
        return _sum_of_rows(y_RH, rows_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        return grad_TH[ctx.tokens_R], None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.inverse_R = inverse_R  # not saved, as in _Combine
        return x_R[order_R]

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        return grad_R[ctx.inverse_R], None, None
