"""Choose a run's attention backend from its configuration and model."""

from __future__ import annotations

import torch

from ...kernels.attention import BACKENDS, PER_DOCUMENT, Choice, UnusableBackend, choose_attention_backend
from ..config.settings import RunConfig
from ..errors import UserError
from .architecture import Architecture
from .dtypes import DTYPES


def choose_attention(config: RunConfig, architecture: Architecture, device: torch.device) -> Choice:
    """Return the attention backend of a run, and the reason.

    Raises:
        UserError: ``training.attention_backend`` names one that cannot work here.
    """
    try:
        return choose_for_model(
            config.training.attention_backend,
            architecture,
            device,
            DTYPES[config.training.precision],
            longest=config.training.sequence_length,
            equal_lengths=config.data.attend_across_documents,
        )
    except UnusableBackend as error:
        raise UserError(f"training.attention_backend: {error}") from None


def choose_for_model(
    requested: str,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    *,
    longest: int | None = None,
    equal_lengths: bool = False,
) -> Choice:
    """Return an attention backend that computes all layers of a model.

    Args:
        requested: ``auto``, or a backend.
        architecture: of the model.
        device: where the attention runs.
        dtype: of queries, keys and values.
        longest: maximum length of a document. A window at least as long is full attention.
        equal_lengths: see :func:`choose_attention_backend`.

    Raises:
        UnusableBackend: ``requested`` cannot work here.
    """
    if not architecture.packs_documents:  # blocks compute one document at a time, whose lengths the host needs
        if requested not in ("auto", PER_DOCUMENT):
            raise UnusableBackend(f"{requested} is for packed documents, which this model does not support; use auto")
        return Choice(PER_DOCUMENT, f"{BACKENDS[PER_DOCUMENT]}; the blocks compute one document at a time")
    windows = architecture.sliding_windows
    if longest is not None:
        windows = tuple(None if window is None or window >= longest else window for window in windows)
    return choose_attention_backend(
        requested,
        device,
        dtype,
        architecture.head_dim,
        windows=windows,
        equal_lengths=equal_lengths,
        value_head_dim=architecture.value_head_dim,
        softcap=architecture.attention_softcap is not None,
        sinks=architecture.attention_sinks,
    )
