"""Round fp32 to bf16 up or down at random, so that the expected result is the number itself.

The random bits (:mod:`retemper.kernels.random_bits`) are a function of (seed, step, name of the parameter, position in
the whole parameter) only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Return the bf16 neighbour above or below each value, the nearer one with higher probability: E[result] = value.

    bf16 is the upper half of fp32. Adding a uniform number to the lower half before it is cut off carries over with the
    right probability, to within 2^-16. Values that bf16 can represent are unchanged; so are infinities and NaN.

    Args:
        values: [...] fp32.
        bits: [...] int32; only the lower 16 bits are used.

    Returns:
        [...] bf16.
    """
    # The bits of a NaN may overflow into those of a number.
    raw = (values.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return torch.where(values.isfinite(), raw.view(torch.float32), values).to(torch.bfloat16)
