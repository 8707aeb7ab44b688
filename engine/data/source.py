"""A dataset, or a part of one, cut into windows of equal length: what the sample order numbers.

Window ``w`` covers the tokens ``[w * S, w * S + S]`` of its part: S inputs, and one more so that each has a target.
Documents lie behind one another without padding, so no token is lost but the last partial window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .indexed_dataset import IndexedDataset


class Window(NamedTuple):
    """One sample before packing."""

    tokens: np.ndarray
    """[S + 1] int64 token ids."""
    boundaries: np.ndarray
    """Positions in 1..S at which another document begins."""


@dataclass(frozen=True)
class Source:
    """The tokens ``[start, stop)`` of a dataset, in windows of ``sequence_length``."""

    name: str
    dataset: IndexedDataset
    sequence_length: int
    start: int
    stop: int

    @property
    def num_windows(self) -> int:
        """Whole windows in this part."""
        return max(0, (self.stop - self.start - 1) // self.sequence_length)

    def window(self, index: int, vocab_size: int) -> Window:
        """Read window ``index``.

        Raises:
            UserError: a token id is outside ``[0, vocab_size)``.
        """
        assert 0 <= index < self.num_windows
        start = self.start + index * self.sequence_length
        stop = start + self.sequence_length + 1
        tokens = self.dataset.tokens(start, stop)
        largest, smallest = int(tokens.max()), int(tokens.min())
        if largest >= vocab_size or smallest < 0:
            bad = largest if largest >= vocab_size else smallest
            position = start + int((tokens == bad).argmax())
            raise UserError(
                f"{self.dataset.prefix}.bin: token id {bad} at token {position:,} is outside the model's vocabulary of "
                f"{vocab_size:,}; preprocess the corpus with the model's own tokenizer"
            )
        return Window(tokens, self.dataset.boundaries(start, stop) - start)


def split_source(name: str, dataset: IndexedDataset, sequence_length: int, held_out: float) -> tuple[Source, Source]:
    """(training part, held-out part): the last share ``held_out`` of the tokens, cut where a document begins so that
    no document is on both sides."""
    cut = dataset.next_boundary(round(dataset.num_tokens * (1 - held_out)))
    return (
        Source(name, dataset, sequence_length, 0, cut),
        Source(name, dataset, sequence_length, cut, dataset.num_tokens),
    )
