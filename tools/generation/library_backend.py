"""Generate with a model of the transformers library and its caches."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import UserError
from ...engine.model.architecture import Architecture
from ...engine.model.generic.architecture import TransformersArchitecture
from ...engine.model.generic.self_check import tiny_models
from .backend import Backend, RecomputingSession, Session
from .cache_check import Finding, check_type, rope_depends_on_length

_PAD = 0
"""A token of padding, which attention does not see. Any id of the vocabulary will do."""


class LibraryBackend(Backend):
    """A causal language model of transformers.

    Args:
        module: the model, in evaluation mode.
        architecture: of the model.
        obstacle: why its cache cannot be used; None if it can. See :func:`library_backend`.
    """

    def __init__(self, module: Any, architecture: Architecture, obstacle: str | None = None):
        self.module, self.architecture, self.device = module, architecture, module.device
        self.obstacle = obstacle
        parameters = inspect.signature(module.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # The head runs only on the last position: logits of all positions would need T times the memory.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def open(self, longest: int) -> Session:
        """See :class:`Backend`."""
        return CachedSession(self) if self.obstacle is None else RecomputingSession(self.compute)

    def compute(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Backend`."""
        return self.logits(sequences, self.padding_mask([*map(len, sequences)]), use_cache=False)

    def logits(self, new_ids: Sequence[Sequence[int]], mask_BS: Tensor, **cache: Any) -> Tensor:
        """Return the [B, V] fp32 logits after tokens that end at the end of ``mask_BS``, which is 0 at padding."""
        longest = max(map(len, new_ids))
        rows = [[*[_PAD] * (longest - len(ids)), *ids] for ids in new_ids]
        if self._takes_positions:
            cache["position_ids"] = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -longest:]
        tokens_BL = torch.tensor(rows, device=self.device)
        output = self.module(input_ids=tokens_BL, attention_mask=mask_BS, **self._options, **cache)
        return output.logits[:, -1].float()

    def padding_mask(self, lengths: Sequence[int]) -> Tensor:
        """Return [B, S] int64: 0 at the padding in front of sequences of ``lengths`` tokens, 1 at their tokens."""
        padding = max(lengths) - torch.tensor(lengths, device=self.device)
        return (torch.arange(max(lengths), device=self.device) >= padding[:, None]).long()


class CachedSession(Session):
    """Sequences in a cache of transformers, padded on the left to one length."""

    def __init__(self, backend: LibraryBackend):
        from transformers import DynamicCache

        module: Any = backend.module
        self._backend = backend
        self._cache: Any = DynamicCache(config=module.config)
        self._mask_BS: Tensor | None = None

    def append(self, new_ids: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Session`."""
        added = self._backend.padding_mask([*map(len, new_ids)])
        self._mask_BS = added if self._mask_BS is None else torch.cat((self._mask_BS, added), dim=1)
        return self._backend.logits(new_ids, self._mask_BS, past_key_values=self._cache, use_cache=True)

    def keep(self, rows: Sequence[int]) -> None:
        """See :class:`Session`."""
        assert self._mask_BS is not None
        index = torch.tensor(rows, device=self._backend.device)
        self._cache.reorder_cache(index)
        self._mask_BS = self._mask_BS[index]


def load_library_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the Hugging Face ``folder``, whose weights have been compared with its config, in evaluation mode.

    Raises:
        UserError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # it has no class of its own for unsupported settings
        raise UserError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device).eval()


def library_backend(module: Any, architecture: Architecture) -> LibraryBackend:
    """Return the backend of a model of transformers, with its cache if that is exact."""
    finding = _check(architecture)
    backend = LibraryBackend(module, architecture, finding.obstacle)
    backend.needs_equal_lengths = not finding.takes_padding
    return backend


def _check(architecture: Architecture) -> Finding:
    if not isinstance(architecture, TransformersArchitecture):
        return Finding()
    if rope_depends_on_length(architecture.config):
        return Finding("the rotary embedding of this model depends on the length of a text", takes_padding=False)
    return check_type(lambda: LibraryBackend(tiny_models(architecture)[0].eval(), architecture))
