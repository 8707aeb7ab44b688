"""Orthogonalize matrices by the Newton-Schulz iteration of Muon."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/: the quintic with the steepest slope at zero."""
_EPS = 1e-7


def newton_schulz(matrix: Tensor, num_steps: int) -> Tensor:
    """Return an approximation of U V^T, where U S V^T is the singular value decomposition of ``matrix``.

    The singular values of the result are between about 0.7 and 1.2, as in ``torch.optim.Muon``. The iteration is the
    one of https://kellerjordan.github.io/posts/muon/.

    Args:
        matrix: [rows, columns], or [batch, rows, columns] for several, bf16 or fp32, the dtype of the computation.
        num_steps: iterations; 5 are usual.

    Returns:
        of the shape and dtype of ``matrix``.
    """
    a, b, c = COEFFICIENTS
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)  # the spectral norm is at most the Frobenius norm
    for _ in range(num_steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def newton_schulz_flops(shape: Sequence[int], num_steps: int) -> float:
    """Return the floating-point operations of the products of :func:`newton_schulz`.

    With m <= n the sizes of a matrix, an iteration has two products of 2 m^2 n operations and one of 2 m^3.

    Args:
        shape: of the matrix, or of several, see there.
        num_steps: iterations.
    """
    *stack, rows, columns = shape
    short, long = sorted((rows, columns))
    return num_steps * math.prod(stack) * (4.0 * short * short * long + 2.0 * short**3)
