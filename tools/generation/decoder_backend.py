"""Generate with our own models: the native decoder, and modules of transformers with our attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...engine.batch import Batch
from ...engine.model.attention_choice import choose_for_model
from ...engine.model.families import DecoderArchitecture
from ...engine.model.generic.architecture import TransformersArchitecture
from ...engine.model.language_model import LanguageModel
from .backend import Backend, RecomputingSession, Session
from .key_value_cache import KeyValueCache, make_step

_TOLERANCE = 1e-4
"""Of logits, relative to the largest one. Rounding causes about 1e-6."""
_CHECKED_TOKENS = 24
"""Longer than the window of a tiny model."""


class DecoderBackend(Backend):
    """A model of the engine.

    Args:
        module: the model, in evaluation mode on ``device``.
        device: where it is.
        has_cache: whether its blocks remember nothing but keys and values. See :func:`find_obstacle`.
    """

    module: LanguageModel

    def __init__(self, module: LanguageModel, device: torch.device, has_cache: bool = True):
        self.module, self.architecture, self.device = module, module.architecture, device
        self.has_cache = has_cache
        self._cache = KeyValueCache(module) if has_cache else None
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
        """Return the [B, V] fp32 logits after each of several whole sequences."""
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


def find_obstacle(module: LanguageModel) -> str | None:
    """Return why the cache cannot be used for a model, in words; None if it can.

    A model of transformers may keep more than keys and values, or find positions in another way. So a tiny model of the
    same type is computed with the cache and without.
    """
    architecture = module.architecture
    if isinstance(architecture, DecoderArchitecture):
        return None
    assert isinstance(architecture, TransformersArchitecture)
    if not architecture.packs_documents:
        return "its blocks mix tokens outside of attention"
    if _rope_depends_on_length(architecture.config):
        return "its rotary embedding depends on the length of a text"
    try:
        difference = _difference_of_tiny_model(architecture)
    except Exception as error:  # whatever the code of the type raises
        return f"a tiny model of its type fails with the cache ({' '.join(str(error).split())[:120]})"
    return None if difference <= _TOLERANCE else "a tiny model of its type gives other logits with the cache"


def _rope_depends_on_length(config: object) -> bool:
    """Return whether a configuration contains a rotary scaling whose frequencies change with the length."""
    if isinstance(config, dict):
        kind = config.get("rope_type", config.get("type"))
        return kind in ("dynamic", "longrope") or any(map(_rope_depends_on_length, config.values()))
    return False


@torch.inference_mode()
def _difference_of_tiny_model(architecture: TransformersArchitecture) -> float:
    """Return the largest difference of logits with and without the cache, relative to the largest logit."""
    from ...engine.model.generic.self_check import tiny_packed_model

    tiny = tiny_packed_model(architecture)
    backend = DecoderBackend(tiny, torch.device("cpu"))
    ids = [(7 * number) % tiny.architecture.vocab_size for number in range(_CHECKED_TOKENS)]
    first = _CHECKED_TOKENS // 2
    expected = torch.cat([backend.compute([ids[:end]]) for end in range(first, _CHECKED_TOKENS + 1)])
    session = backend.open(_CHECKED_TOKENS)
    found = torch.cat([session.append([ids[:first]]), *(session.append([[token]]) for token in ids[first:])])
    return float((found - expected).abs().max() / expected.abs().max())
