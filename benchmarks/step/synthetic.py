"""Make a dataset of random tokens with given document lengths, for measuring a step without a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...engine.data.index_format import best_dtype
from ...engine.errors import UserError
from ..token_files import write_dataset

_FORMS = "use whole, fixed:TOKENS, uniform:LEAST:MOST or lognormal:MEAN[:SIGMA], lengths from 1"
_MOST_TOKENS = 1 << 22
"""Maximum size: a longer measurement reads the dataset several times, in another order each time."""


@dataclass(frozen=True)
class DocumentLengths:
    """The lengths of the documents in a random corpus."""

    kind: Literal["whole", "fixed", "uniform", "lognormal"]
    """whole: the corpus is one document, so every sample is a piece of it and attends to all of itself."""
    numbers: tuple[float, ...] = ()
    """fixed: the length; uniform: minimum and maximum; lognormal: mean, and the logarithm's standard deviation."""

    @classmethod
    def parse(cls, text: str) -> DocumentLengths:
        """Parse the value of the flag ``--documents``.

        Raises:
            UserError: it has none of the forms.
        """
        kind, *parts = text.split(":")
        counts: dict[str, tuple[int, ...]] = {"whole": (0,), "fixed": (1,), "uniform": (2,), "lognormal": (1, 2)}
        try:
            numbers = tuple(float(part) if kind == "lognormal" else int(part) for part in parts)
        except ValueError:
            numbers = (0.0,) * 3
        good = len(numbers) in counts.get(kind, ()) and all(0 < number < 1e9 for number in numbers)
        if not good or (kind == "lognormal" and numbers[0] < 1) or (kind == "uniform" and numbers[0] > numbers[1]):
            raise UserError(f"--documents {text}: {_FORMS}")
        if kind == "lognormal":
            numbers = (numbers[0], numbers[1] if len(numbers) > 1 else 1.0)
        return cls(kind, numbers)  # type: ignore[arg-type]

    def draw(self, num_tokens: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return [documents] lengths that sum to ``num_tokens``; the last document is cut."""
        if self.kind == "whole":
            return np.array([num_tokens])
        drawn: list[npt.NDArray[np.int64]] = []
        missing = num_tokens
        while missing > 0:
            drawn.append(self._draw_many(generator))
            missing -= int(drawn[-1].sum())
        lengths = np.concatenate(drawn)
        ends = np.cumsum(lengths)
        lengths = lengths[: int(np.searchsorted(ends, num_tokens)) + 1]
        lengths[-1] -= lengths.sum() - num_tokens
        return lengths

    def _draw_many(self, generator: np.random.Generator, count: int = 4096) -> npt.NDArray[np.int64]:
        if self.kind == "fixed":
            return np.full(count, int(self.numbers[0]))
        if self.kind == "uniform":
            return generator.integers(int(self.numbers[0]), int(self.numbers[1]), size=count, endpoint=True)
        mean, sigma = self.numbers
        # The mean of a lognormal is exp(mu + sigma^2 / 2).
        drawn = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, size=count)
        return np.maximum(1, np.rint(np.minimum(drawn, 1e9))).astype(np.int64)


def write_random_dataset(
    prefix: Path, lengths: DocumentLengths, vocab_size: int, sequence_length: int, samples: int, step: int, seed: int
) -> None:
    """Write a dataset for ``samples`` samples, or for fewer that are read repeatedly if there would be too many.

    Args:
        prefix: of the dataset.
        lengths: of the documents.
        vocab_size: tokens are drawn uniformly from it.
        sequence_length: tokens in a sample.
        samples: requested number.
        step: samples in a step; the minimum number.
        seed: the same seed gives the same dataset.
    """
    windows = max(step, min(samples, _MOST_TOKENS // sequence_length))
    num_tokens = windows * sequence_length + 1  # target of the last window's last token
    generator = np.random.default_rng(seed)
    dtype = best_dtype(vocab_size)
    tokens = generator.integers(0, vocab_size, size=num_tokens, dtype=dtype)
    write_dataset(prefix, dtype, lengths.draw(num_tokens, generator), [tokens])
