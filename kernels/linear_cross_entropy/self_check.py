"""Check the persistent kernel on this GPU against PyTorch before it is used: once per process and head width."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import chunked
from .rows import Gradients, Needs, Options

_TOKENS, _VOCABULARY = 300, 1000
"""No multiples of a tile, with several tiles in both directions."""
_BUDGET = 2**28
_BOUND = 2e-2
"""Largest relative error. Gradients of bf16 inputs have errors of some 1e-3; a wrong result is wrong by more."""


@functools.cache
def persistent_problem(device: torch.device, width: int) -> str | None:
    """Return what is wrong with the persistent kernel for hidden states [T, width]; None if nothing is.

    The kernel reads and writes through tensor descriptors, which depend on the versions of Triton and of the driver.
    A problem is also a warning, since the pointer kernel that replaces it may be slower.
    """
    from . import triton_loss

    problem = find_problem(functools.partial(triton_loss.compute, persistent=True), device, width)
    if problem is not None:
        warnings.warn(
            f"cross-entropy: the persistent Triton kernel is not used on this GPU ({problem}); the kernel that reads "
            "through pointers replaces it",
            stacklevel=2,
        )
    return problem


@torch.no_grad()
def find_problem(compute: Callable[..., Gradients], device: torch.device, width: int) -> str | None:
    """Return what is wrong with the losses or gradients of ``compute`` in bf16; None if nothing is."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(_TOKENS, width, generator=generator).to(device, torch.bfloat16)
    # The first row's logits are so large that the pass for far rows computes its block.
    hidden[0] *= 100
    weight = (torch.randn(_VOCABULARY, width, generator=generator) / width**0.5).to(device, torch.bfloat16)
    targets = torch.randint(0, _VOCABULARY, (_TOKENS,), generator=generator).to(device)
    rest = (None, targets, Options(), _BUDGET, Needs(hidden=True, weight=True, bias=False))
    try:
        actual = compute(hidden, weight, *rest)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"it raises {' '.join(str(error).split())[:120]}"
    expected = chunked.compute(hidden.float(), weight.float(), *rest)
    pairs = {
        "the losses": (actual.losses_T, expected.losses_T),
        "dX": (actual.hidden_TH, expected.hidden_TH),
        "dW": (actual.weight_VH, expected.weight_VH),
    }
    errors = {name: _relative_error(*pair) for name, pair in pairs.items()}
    wrong = [f"{error:.2g} in {name}" for name, error in errors.items() if not error <= _BOUND]  # also if it is NaN
    return f"wrong by {', '.join(wrong)}" if wrong else None


def _relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None and expected is not None
    return float((actual.float() - expected).norm() / expected.norm())
