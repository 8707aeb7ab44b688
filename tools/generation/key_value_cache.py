"""A key/value cache for our own models: it replaces the attention operation of every block.

The first tokens of a session run as packed documents through the attention of the model itself, and their keys and
values are kept. Later tokens attend to what is kept. Every block has one [B, K, S, D] tensor of keys and one of values;
both grow in steps. Tokens outside the window of a block are kept too.

Shapes: B sequences, L new tokens of each, T all new tokens, S tokens of the longest sequence, N query heads, K
key/value heads, D size of queries and keys, E of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...engine.model.language_model import Attend, LanguageModel
from ...kernels.attention.cached import cached_attention

_GROWTH = 256
"""Tokens by which a cache grows at least."""


@dataclass
class Step:
    """The new tokens of one pass, and their places in the cache."""

    counts: list[int]
    """New tokens of each sequence. All are equal unless ``is_first``."""
    lengths: list[int]
    """Tokens of each sequence, with the new ones."""
    rows_T: Tensor
    """Sequence of each new token."""
    positions_T: Tensor
    """Its position there."""
    is_first: bool
    """Whether nothing is in the cache yet."""
    limit: int
    """Maximum length of a sequence."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    """See :meth:`visible`, by window."""

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths)

    def visible(self, window: int | None) -> Tensor | None:
        """Return [B, L, S] bool, whether a new token sees a token; None if each sees all."""
        if window not in self.masks:
            self.masks[window] = self._visible(window)
        return self.masks[window]

    def _visible(self, window: int | None) -> Tensor | None:
        longest = self.longest
        if self.counts[0] == 1 and min(self.lengths) == longest and (window is None or window >= longest):
            return None
        positions_BL = self.positions_T.view(len(self.counts), -1)
        distance = positions_BL[..., None] - torch.arange(longest, device=positions_BL.device)
        visible = distance >= 0
        return visible if window is None else visible & (distance < window)


class BlockCache:
    """Keys and values of one block. It is also the attention operation of the block."""

    def __init__(self, attend: Attend):
        self._attend = attend
        self.step: Step | None = None
        """The pass that is being computed; None: the attention is that of the model itself."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.step = self._keys = self._values = None

    def keep(self, rows: Tensor) -> None:
        """See :meth:`~.backend.Session.keep`."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def attend(self, q_TND: Tensor, k_TKD: Tensor, v_TKE: Tensor, *offsets: Any, **options: Any) -> Tensor:
        """Compute the attention of a block, as :func:`~retemper.kernels.attention.attention` does."""
        step = self.step
        if step is None:
            return self._attend(q_TND, k_TKD, v_TKE, *offsets, **options)
        self._keys = self._write(self._keys, k_TKD, step)
        self._values = self._write(self._values, v_TKE, step)
        if step.is_first:
            return self._attend(q_TND, k_TKD, v_TKE, *offsets, **options)
        window = options.pop("window", None)
        options.pop("plan", None)
        q_BNLD = q_TND.unflatten(0, (len(step.counts), -1)).transpose(1, 2)
        keys, values = self._keys[:, :, : step.longest], self._values[:, :, : step.longest]
        mixed_BNLE = cached_attention(q_BNLD, keys, values, step.visible(window), **options)
        return mixed_BNLE.transpose(1, 2).flatten(0, 1)

    def _write(self, kept: Tensor | None, new_TKD: Tensor, step: Step) -> Tensor:
        """Return the tensor ``kept`` [B, K, S, D], or a larger one, with the new tokens in their places."""
        size = 0 if kept is None else kept.shape[2]
        if size < step.longest:
            larger = min(step.limit, max(step.longest + _GROWTH, size + size // 2))
            grown = new_TKD.new_zeros(len(step.counts), new_TKD.shape[1], larger, new_TKD.shape[2])
            if kept is not None:
                grown[:, :, :size] = kept
            kept = grown
        assert kept is not None
        kept[step.rows_T, :, step.positions_T] = new_TKD
        return kept


class KeyValueCache:
    """The cache of all blocks of a model.

    Args:
        model: whose attention this replaces, for good.
    """

    def __init__(self, model: LanguageModel):
        self._blocks: list[BlockCache] = []
        model.wrap_attention(self._wrap)

    def _wrap(self, attend: Attend) -> Attend:
        block = BlockCache(attend)
        self._blocks.append(block)
        return block.attend

    def begin(self, step: Step | None) -> None:
        """Let the next pass compute ``step``; None: a pass without the cache."""
        for block in self._blocks:
            block.step = step

    def clear(self) -> None:
        """Forget everything."""
        for block in self._blocks:
            block.clear()

    def keep(self, rows: Tensor) -> None:
        """See :meth:`~.backend.Session.keep`."""
        for block in self._blocks:
            block.keep(rows)


def make_step(before: Sequence[int], counts: Sequence[int], limit: int, device: torch.device) -> Step:
    """Return the step of ``counts`` new tokens after sequences of ``before`` tokens."""
    rows = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], device=device)
    positions = [
        position for start, count in zip(before, counts, strict=True) for position in range(start, start + count)
    ]
    is_first = not any(before)
    assert is_first or len({*counts}) == 1
    lengths = [start + count for start, count in zip(before, counts, strict=True)]
    return Step([*counts], lengths, rows, torch.tensor(positions, device=device), is_first, limit)
