"""Generate with our own models: the native decoder, and modules of transformers with our attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...engine.batch import Batch
from ...engine.model.attention_choice import choose_for_model
from ...engine.model.families import DecoderArchitecture
from ...engine.model.generic.architecture import TransformersArchitecture
from ...engine.model.generic.self_check import tiny_models
from ...engine.model.language_model import LanguageModel
from .backend import Backend, RecomputingSession, Session
from .cache_check import check_type, rope_depends_on_length
from .key_value_cache import KeyValueCache, make_step


class DecoderBackend(Backend):
    """A model of the engine.

    Args:
        module: the model, in evaluation mode on ``device``.
        device: where it is.
        obstacle: why the cache cannot be used; None if it can. See :func:`own_backend`.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel, device: torch.device, obstacle: str | None = None):
        self.module, self.architecture, self.device = module, module.architecture, device
        self.obstacle = obstacle
        self._cache = KeyValueCache(module) if obstacle is None else None
        # Not as documents of equal lengths: every call has another length, and cuDNN would plan each one again.
        dtype = next(module.parameters()).dtype
        self._attention_backend = choose_for_model("auto", self.architecture, device, dtype).backend

    def open(self, longest: int) -> Session:
        """See :class:`Backend`. Sequences share one cache, so the former session is closed."""
        unscaled = self.architecture.longest_unscaled
        if self._cache is None or (unscaled is not None and longest > unscaled):
            if self._cache is not None:
                self._cache.clear()
            return RecomputingSession(self.compute)
        return CachedSession(self, self._cache, longest)

    def compute(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Backend`."""
        return self.logits(self.prepared(self.packed(sequences)), [*map(len, sequences)])

    def packed(self, sequences: Sequence[Sequence[int]]) -> Batch:
        """Return a batch of the sequences as documents."""
        tokens = torch.tensor([token for sequence in sequences for token in sequence])
        return Batch.of_documents(tokens, [*map(len, sequences)])

    def prepared(self, batch: Batch) -> Batch:
        """Return ``batch`` on the device, with its attention planned."""
        return batch.prepare(self.device, self._attention_backend, self.architecture.sliding_windows)

    def logits(self, batch: Batch, counts: Sequence[int]) -> Tensor:
        """Return the logits after the last token of each of the batch's documents of ``counts`` tokens."""
        last = torch.tensor(counts, device=self.device).cumsum(0) - 1
        # The head runs only on the last positions: logits of all positions would need many times the memory.
        return self.module.head_logits(self.module.hidden_states(batch)[last]).float()


class CachedSession(Session):
    """Sequences whose keys and values are kept.

    Args:
        backend: that computes the model.
        cache: of the model.
        longest: maximum length of a sequence.
    """

    def __init__(self, backend: DecoderBackend, cache: KeyValueCache, longest: int):
        cache.clear()
        self._backend, self._cache, self._longest = backend, cache, longest
        self._lengths: list[int] = []

    def append(self, new_ids: Sequence[Sequence[int]]) -> Tensor:
        """See :class:`Session`."""
        counts = [*map(len, new_ids)]
        step = make_step(self._lengths or [0] * len(counts), counts, self._longest, self._backend.device)
        batch = self._backend.packed(new_ids)
        # Only the first tokens are computed by the attention of the model, which needs a plan.
        batch = self._backend.prepared(batch) if step.is_first else batch.to(self._backend.device)
        self._cache.begin(step)
        try:
            logits = self._backend.logits(batch._replace(position_ids=step.positions_T), counts)
        finally:
            self._cache.begin(None)
        self._lengths = step.lengths
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """See :class:`Session`."""
        self._lengths = [self._lengths[row] for row in rows]
        self._cache.keep(torch.tensor(rows, device=self._backend.device))


def own_backend(module: LanguageModel, device: torch.device) -> DecoderBackend:
    """Return the backend of a model, with the cache if that is exact."""
    obstacle = _obstacle(module)
    if obstacle is not None:
        obstacle += "; an exported Hugging Face folder uses the cache of transformers"
    return DecoderBackend(module, device, obstacle)


def _obstacle(module: LanguageModel) -> str | None:
    """Return why the cache cannot be used for a model, in words; None if it can."""
    architecture = module.architecture
    if isinstance(architecture, DecoderArchitecture):
        return None
    assert isinstance(architecture, TransformersArchitecture)
    if not architecture.packs_documents:
        return "blocks of this model mix tokens outside of attention"
    if rope_depends_on_length(architecture.config):
        return "the rotary embedding of this model depends on the length of a text"
    return check_type(lambda: DecoderBackend(tiny_models(architecture)[1], torch.device("cpu"))).obstacle
