"""Choose the next tokens from logits, with the logits processors of transformers.

The random numbers of a sequence are a function of the seed and the number of its sample. So a text depends neither on
the other prompts of a batch nor on the size of the batch, apart from rounding.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .sampling import Sampling


class TokenChoice:
    """Chooses tokens as ``transformers.generate`` does: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        sampling: the options.
    """

    def __init__(self, sampling: Sampling):
        self._is_greedy = sampling.temperature == 0
        self._needs_ids = sampling.repetition_penalty != 1
        self._processors = LogitsProcessorList()
        if self._needs_ids:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._is_greedy:
            self._processors.extend(_warpers(sampling))

    def choose(
        self, logits_BV: Tensor, sequences: Sequence[Sequence[int]], randoms: Sequence[np.random.Generator]
    ) -> list[int]:
        """Return the next token of each sequence.

        Args:
            logits_BV: [B, V] fp32.
            sequences: all tokens of each sequence so far, none empty.
            randoms: of each sequence. If tokens are sampled, one number is drawn from each.
        """
        ids = self._rectangle(sequences).to(logits_BV.device)
        scores_BV = self._processors(ids, logits_BV)  # type: ignore[arg-type]
        if self._is_greedy:
            return scores_BV.argmax(-1).tolist()
        return _draw(scores_BV, [random.random() for random in randoms])

    def _rectangle(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return [B, S] ids. Rows are filled with their first token: repeating a token changes no penalty."""
        if not self._needs_ids:
            return torch.empty(len(sequences), 0, dtype=torch.int64)
        longest = max(map(len, sequences))
        return torch.tensor([[*ids, *[ids[0]] * (longest - len(ids))] for ids in sequences])


def random_numbers(seed: int, sample: int) -> np.random.Generator:
    """Return the random numbers of a sample of each prompt."""
    return np.random.default_rng((seed, sample))


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return what changes the distribution before a token is drawn, in the order of transformers."""
    found = LogitsProcessorList()
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def _draw(scores_BV: Tensor, numbers: Sequence[float]) -> list[int]:
    """Return the token of each row at which the cumulative probability exceeds its number from [0, 1).

    Probabilities are float64, so that tokens without probability are never drawn, and likely ones as often as they
    should be.
    """
    cumulative_BV = scores_BV.double().softmax(-1).cumsum(-1)
    numbers_B1 = torch.tensor(numbers, dtype=torch.float64, device=scores_BV.device)[:, None]
    drawn_B1 = torch.searchsorted(cumulative_BV, numbers_B1 * cumulative_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp(max=scores_BV.shape[-1] - 1).tolist()
