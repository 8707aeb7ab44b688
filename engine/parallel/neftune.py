"""NEFTune: uniform noise on the embeddings of training, as a function of the seed and the token's place in the run.

Jain et al., 2023, https://arxiv.org/abs/2310.05914: noise in [-1, 1] times ``alpha / sqrt(L * H)`` for L tokens and H
features. L is ``training.sequence_length``, the length of a sample, as in TRL and transformers, where the documents of
a packed sample share one noise scale. A batch without ``token_numbers`` is not for training and gets no noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels.random_bits import stream_key, token_uniform
from ..batch import Batch
from ..config.settings import RunConfig
from ..model.language_model import LanguageModel
from .mesh import Mesh


class EmbeddingNoise:
    """Adds noise to embeddings. Ranks that share a sample add the noise of their own tokens.

    Args:
        bound: largest absolute value of the noise.
        seed: of the run.
        part: which of the equal parts of a batch's tokens this rank embeds; nonzero only with sequence parallelism.
    """

    def __init__(self, bound: float, seed: int, part: int = 0):
        self._bound, self._keys, self._part = bound, stream_key(seed, 0, "neftune"), part

    def __call__(self, hidden_TH: Tensor, batch: Batch) -> Tensor:
        """Return [..., T, H] embeddings with noise, in their dtype."""
        if batch.token_numbers is None:
            return hidden_TH
        num_tokens, width = hidden_TH.shape[-2:]
        first, device = self._part * num_tokens, hidden_TH.device
        numbers = batch.token_numbers[first : first + num_tokens]
        keys = torch.tensor(self._keys, dtype=torch.int32, device=device)
        noise = token_uniform(numbers, torch.arange(width, device=device), keys).mul_(2).sub_(1).mul_(self._bound)
        return (hidden_TH + noise).to(hidden_TH.dtype)


def noise_bound(alpha: float, sequence_length: int, hidden_size: int) -> float:
    """Return ``alpha / sqrt(L * H)``."""
    return alpha / math.sqrt(sequence_length * hidden_size)


def apply(model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
    """Let training add noise to the embeddings of ``model``, if the run asks for it."""
    alpha = config.training.neftune_alpha
    if alpha is None or not model.is_first:
        return
    bound = noise_bound(alpha, config.training.sequence_length, model.architecture.hidden_size)
    model.change_embeddings(EmbeddingNoise(bound, config.seed, mesh.coordinate.tensor))
