"""Choose a run's attention backend from its configuration and model."""

from __future__ import annotations

import torch

from ...kernels.attention import Choice, UnusableBackend, choose_attention_backend
from ..config.settings import RunConfig
from ..errors import UserError
from .dtypes import DTYPES
from .language_model import Architecture


def choose_attention(config: RunConfig, architecture: Architecture, device: torch.device) -> Choice:
    """Return the attention backend of a run, and the reason.

    Raises:
        UserError: ``training.attention_backend`` names one that cannot work here.
    """
    # A window at least as long as the sequence is full attention.
    longest = config.training.sequence_length
    windows = [None if window is None or window >= longest else window for window in architecture.sliding_windows]
    try:
        return choose_attention_backend(
            config.training.attention_backend,
            device,
            DTYPES[config.training.precision],
            architecture.head_dim,
            windows=windows,
            equal_lengths=config.data.attend_across_documents,
        )
    except UnusableBackend as error:
        raise UserError(f"training.attention_backend: {error}") from None
