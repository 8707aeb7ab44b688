"""The interface of a model that generates text: the logits of the next token of several sequences.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...engine.model.architecture import Architecture

LARGE_CACHE_BYTES = 1 << 30
"""A cache of at least this size is worth a note."""


class Session(ABC):
    """Sequences that grow, and what the model remembers of them."""

    @abstractmethod
    def append(self, new_ids: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each sequence, and return the [B, V] fp32 logits of the next one.

        Args:
            new_ids: at least one token for each sequence. The first call starts the sequences, with any lengths. In
                later calls all have the same number of new tokens.
        """

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Replace the sequences by those with these numbers. A number may occur several times."""


class Backend(ABC):
    """A model that generates text."""

    module: nn.Module
    """The model itself."""
    architecture: Architecture
    device: torch.device
    needs_equal_lengths: bool = False
    """Whether all prompts of a session must have the same length."""
    obstacle: str | None = None
    """Why sessions compute all earlier tokens again for each new one, in words; None: they have a cache."""

    @abstractmethod
    def compute(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the [B, V] fp32 logits after each of several whole sequences, without the cache."""

    @abstractmethod
    def open(self, longest: int) -> Session:
        """Return a session without sequences. No sequence gets longer than ``longest`` tokens."""

    @property
    def notes(self) -> list[str]:
        """Remarks for the user, a line each."""
        if self.obstacle is None:
            return []
        return [f"every token computes the whole text again, without a key/value cache: {self.obstacle}"]

    def cache_bytes(self, num_sequences: int, length: int) -> int:
        """Return the bytes of all keys and values of so many sequences of ``length`` tokens."""
        facts = self.architecture
        per_token = facts.num_key_value_heads * (facts.head_dim + (facts.value_head_dim or facts.head_dim))
        element_size = next(self.module.parameters()).element_size()
        return num_sequences * length * facts.num_layers * per_token * element_size

    def describe_cache(self, num_sequences: int, length: int) -> str | None:
        """Return a remark about the size of the cache; None if it is small or there is none."""
        size = self.cache_bytes(num_sequences, length)
        if self.obstacle is not None or size < LARGE_CACHE_BYTES:
            return None
        return (
            f"the key/value cache of {num_sequences} texts of {length:,} tokens takes up to {size / 2**30:.1f} GiB; "
            "--batch-size and --max-new-tokens make it smaller"
        )


class RecomputingSession(Session):
    """A session that remembers only tokens, and computes all of them again for each new one.

    Args:
        compute: returns the [B, V] logits of the token after each of several whole sequences.
    """

    def __init__(self, compute: Callable[[Sequence[Sequence[int]]], Tensor]):
        self._compute = compute
        self._sequences: list[list[int]] = []

    def append(self, new_ids: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Session`."""
        self._sequences = self._sequences or [[] for _ in new_ids]
        for sequence, ids in zip(self._sequences, new_ids, strict=True):
            sequence.extend(ids)
        return self._compute(self._sequences)

    def keep(self, rows: Sequence[int]) -> None:
        """See :class:`Session`."""
        self._sequences = [list(self._sequences[row]) for row in rows]
