"""Compute the losses of the windows of a set, and sum them over tokens, documents and ranks."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ...engine.model.attention_choice import context_kind
from ...engine.observe.waiting import ProgressBar, Say
from ...engine.parallel.context import own_tokens
from ...engine.parallel.process_group import Ranks
from ...engine.parallel.token_losses import token_losses
from ...kernels.linear_cross_entropy import IGNORE_INDEX
from ..tokenizer.token_bytes import TokenBytes
from .model import EvaluatedModel
from .windows import ScoredBatch, Windows

_BATCHES_AT_ONCE = 8
"""Batches between two looks at the progress, in whole steps of a pipeline."""


class DocumentSums:
    """Sums over the scored tokens of each of D documents.

    Args:
        num_documents: D.
        texts: bytes of every token; None if they are unknown.
    """

    def __init__(self, num_documents: int, texts: TokenBytes | None) -> None:
        self._texts = texts
        self.has_texts = texts is not None
        self._sums = np.zeros((5, num_documents))
        self.nats, self.targets, self.text_nats, self.text_targets, self.num_bytes = self._sums

    def add(self, scored: ScoredBatch, parts: tuple[slice, ...], losses: npt.NDArray[np.float64]) -> None:
        """Add the ``losses`` of some ``parts`` of the tokens of a batch, in their order."""
        tokens, targets, documents, places = (
            np.concatenate([values[part] for part in parts])
            for values in (
                scored.batch.tokens.numpy(),
                scored.batch.targets.numpy(),
                scored.documents_T,
                scored.places_T,
            )
        )
        valid = targets != IGNORE_INDEX
        tokens, targets, documents, places, losses = (
            values[valid] for values in (tokens, targets, documents, places, losses)
        )
        np.add.at(self.nats, documents, losses)
        np.add.at(self.targets, documents, 1)
        if self._texts is None:
            return
        # The first text of a document is its first token, or the second one after a BOS.
        are_first = (places == 0) | ((places == 1) & ~self._texts.has_text_V[tokens])
        has_text = self._texts.has_text_V[targets]
        documents, targets, are_first = documents[has_text], targets[has_text], are_first[has_text]
        np.add.at(self.text_nats, documents, losses[has_text])
        np.add.at(self.text_targets, documents, 1)
        np.add.at(self.num_bytes, documents, self._texts.count(targets, are_first))

    def sum_over_ranks(self, ranks: Ranks) -> None:
        """Add the sums of all ranks, which all call this."""
        if ranks.world_size > 1:
            dist.all_reduce(torch.from_numpy(self._sums), group=ranks.group)


def score(model: EvaluatedModel, windows: Windows, texts: TokenBytes | None, say: Say) -> DocumentSums:
    """Return the sums of a set over all ranks. All ranks must call this.

    Raises:
        UserError: the dataset cannot be read.
    """
    sums, ranks = DocumentSums(len(windows.starts_D) - 1, texts), model.ranks
    place = model.mesh.coordinate
    kind = context_kind(model.config.parallel, model.architecture)
    size = model.config.training.micro_batch_size * model.config.training.sequence_length
    mine = own_tokens(size, place.context, model.mesh.layout.context, kind)
    step = model.num_micro_batches * max(1, _BATCHES_AT_ONCE // model.num_micro_batches)
    batches = iter(windows)
    what = f"evaluating {windows.source.name}, batches"
    with ProgressBar(what, windows.num_batches, say, ranks.is_main) as bar:
        while some := ranks.fail_together(lambda: list(islice(batches, step))):
            losses = token_losses(model.parts, model.forward_backward, [scored.batch for scored in some])
            if place.tensor == 0:  # the other ranks have the same losses, or none
                for scored, losses_T in zip(some, losses, strict=False):
                    sums.add(scored, mine, losses_T.double().cpu().numpy())
            bar.update(len(some))
    sums.sum_over_ranks(ranks)
    return sums
