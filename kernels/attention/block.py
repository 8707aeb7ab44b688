"""A block of attention: which queries see which keys, and how the results of blocks are merged.

Shapes: L queries of N heads, S keys of K heads (N a multiple of K), D head size of queries and keys, E of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import FA3, FA4, FLASH_ATTN, PER_DOCUMENT, VARLEN

BLOCK_BACKENDS = (FLASH_ATTN, FA3, FA4, VARLEN, PER_DOCUMENT)
"""Backends that compute blocks. All of them support sinks, which :func:`merge` adds as one more block."""


class BlockOptions(NamedTuple):
    """What changes the result of a block, and the backend that computes it."""

    backend: str
    softmax_scale: float
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it; None for all."""
    softcap: float | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive queries and the consecutive keys that they attend to, as parts of documents laid end to end.

    Query i of a part sees key j of the same part if ``0 <= i + lag - j < window``. Every query sees a key.
    """

    first_query: int
    """Row of the first query among the queries of a rank."""
    first_key: int
    """Row of the first key among the keys that are present."""
    query_lengths: tuple[int, ...]
    """Queries of each part."""
    key_lengths: tuple[int, ...]
    """Keys of each part."""
    lag: int
    """Tokens from the first key of a part to its first query. Zero: queries and keys are the same tokens."""

    @property
    def queries(self) -> slice:
        """The rows of the queries."""
        return slice(self.first_query, self.first_query + sum(self.query_lengths))

    @property
    def keys(self) -> slice:
        """The rows of the keys."""
        return slice(self.first_key, self.first_key + sum(self.key_lengths))

    @property
    def num_pairs(self) -> int:
        """The number of pairs of a query and a key it sees, without a window."""
        pairs = zip(self.query_lengths, self.key_lengths, strict=True)
        return sum(L * (L + 1) // 2 if self.lag == 0 else L * S for L, S in pairs)


def merge(out_LNE: Tensor, lse_NL: Tensor, block_out_LNE: Tensor, block_lse_NL: Tensor) -> None:
    """Add the result of a block to ``out_LNE`` and ``lse_NL``, in place.

    The softmax over both sets of keys weighs each output by its share of the sum of exponentials (Liu et al., 2023,
    https://arxiv.org/abs/2310.01889). A log-sum-exp of minus infinity belongs to an output over no keys.

    Args:
        out_LNE: [L, N, E] fp32 (or fp64), over the keys until now.
        lse_NL: [N, L] fp32 (or fp64) log-sum-exp of their scores.
        block_out_LNE: [L, N, E] over other keys.
        block_lse_NL: [N, L], finite.
    """
    both_NL = torch.logaddexp(lse_NL, block_lse_NL)
    share_LN1, block_share_LN1 = ((x - both_NL).exp().T[..., None] for x in (lse_NL, block_lse_NL))
    out_LNE.mul_(share_LN1).addcmul_(block_out_LNE, block_share_LN1)
    lse_NL.copy_(both_NL)
