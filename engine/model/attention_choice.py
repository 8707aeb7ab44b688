"""Choose a run's attention backend from its configuration and model."""

from __future__ import annotations

from typing import Literal

import torch

from ...kernels.attention import BACKENDS, PER_DOCUMENT, Choice, UnusableBackend, choose_attention_backend
from ..config.settings import ParallelConfig, RunConfig
from ..errors import UserError
from .architecture import Architecture
from .dtypes import DTYPES

ContextKind = Literal["heads", "ring"]


def context_kind(parallel: ParallelConfig, architecture: Architecture) -> ContextKind:
    """Return how context-parallel ranks compute attention; see ``parallel.context_kind``. One rank has all heads."""
    if parallel.context == 1:
        return "heads"
    if parallel.context_kind != "auto":
        return parallel.context_kind
    return "heads" if heads_problem(parallel, architecture) is None else "ring"


def heads_problem(parallel: ParallelConfig, architecture: Architecture) -> str | None:
    """Return why ``parallel.context`` ranks cannot exchange heads, both sides of the division; None if they can."""
    size, tensor = parallel.context, parallel.tensor
    heads, kv_heads = architecture.num_attention_heads // tensor, architecture.num_key_value_heads // tensor
    share = f" / parallel.tensor {tensor}" if tensor > 1 else ""
    if heads % size:
        return (
            f"parallel.context {size} does not divide the {heads} attention heads of a rank "
            f"({architecture.num_attention_heads}{share})"
        )
    if kv_heads % size and size % kv_heads:
        return (
            f"parallel.context {size} neither divides the {kv_heads} key/value heads of a rank "
            f"({architecture.num_key_value_heads}{share}) nor is a multiple of them"
        )
    return None


def _describe_context(parallel: ParallelConfig, architecture: Architecture) -> str:
    """Return what context-parallel ranks do, and why, as the end of a line; empty if there are none."""
    if parallel.context == 1:
        return ""
    if parallel.context_kind != "auto":
        reason = "as configured"
    elif (problem := heads_problem(parallel, architecture)) is not None:
        reason = problem
    else:
        reason = "the numbers of heads allow it"
    if context_kind(parallel, architecture) == "heads":
        return f"; {parallel.context} ranks exchange heads for tokens ({reason})"
    return f"; ring attention over {parallel.context} ranks ({reason})"


def choose_attention(config: RunConfig, architecture: Architecture, device: torch.device) -> Choice:
    """Return the attention backend of a run, and the reason.

    Raises:
        UserError: ``training.attention_backend`` names one that cannot work here.
    """
    try:
        choice = choose_for_model(
            config.training.attention_backend,
            architecture,
            device,
            DTYPES[config.training.precision],
            longest=config.training.sequence_length,
            equal_lengths=config.data.attend_across_documents,
            in_blocks=context_kind(config.parallel, architecture) == "ring",
        )
    except UnusableBackend as error:
        raise UserError(f"training.attention_backend: {error}") from None
    return choice._replace(reason=choice.reason + _describe_context(config.parallel, architecture))


def choose_for_model(
    requested: str,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    *,
    longest: int | None = None,
    equal_lengths: bool = False,
    in_blocks: bool = False,
) -> Choice:
    """Return an attention backend that computes all layers of a model.

    Args:
        requested: ``auto``, or a backend.
        architecture: of the model.
        device: where the attention runs.
        dtype: of queries, keys and values.
        longest: maximum length of a document. A window at least as long is full attention.
        equal_lengths: see :func:`choose_attention_backend`.
        in_blocks: see :func:`choose_attention_backend`.

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
        in_blocks=in_blocks,
    )
