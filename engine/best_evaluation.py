"""Record the best evaluation.

Losses on other texts, on more of them, or with shorter windows cannot be compared. A record therefore has a
fingerprint of the evaluated data, and starts over when that changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.linear_cross_entropy import IGNORE_INDEX
from .batch import Batch
from .parallel.process_group import Ranks

_MIX = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Odd constants of splitmix64 (Steele, Lea and Flood, 2014)."""


@dataclass(frozen=True)
class Measure:
    """The measure of the best evaluation: the loss on the first validation set."""

    name: str
    fingerprint: str
    """Fingerprint of all evaluated (token, target, position) of the set."""

    def describes(self, best: Mapping[str, Any]) -> bool:
        """Return whether the record ``best`` uses this measure. Records of versions without fingerprints are compared
        by name.
        """
        return best.get("name") == self.name and best.get("measured", self.fingerprint) == self.fingerprint

    def improves(self, best: Mapping[str, Any], loss: float) -> bool:
        """Return whether ``loss`` replaces the record ``best``."""
        return not self.describes(best) or loss < best["loss"]

    def record(self, step: int, loss: float) -> dict[str, Any]:
        """Return the record of an evaluation, in JSON's types."""
        return {"step": step, "name": self.name, "loss": loss, "measured": self.fingerprint}

    def note_on(self, best: Mapping[str, Any]) -> list[str]:
        """Return a line for the log if the record ``best`` of a checkpoint cannot be continued."""
        if not best or self.describes(best):
            return []
        reason = "of another set" if best.get("name") != self.name else "of other data, eval_tokens or sequence_length"
        return [
            f"note: the record of the best evaluation starts over with {self.name}: {best.get('name')} "
            f"{best.get('loss', float('nan')):.4f} of step {best.get('step')} is {reason}"
        ]


def fingerprint(batches: Iterable[Batch], counted: bool, sequence_length: int, ranks: Ranks) -> str:
    """Return a hash of the evaluated data, which depends neither on the number of ranks nor on the micro-batch.

    Args:
        batches: of this rank.
        counted: whether this rank counts its samples; one of the ranks that read the same ones does.
        sequence_length: of the windows.
        ranks: all must call this.
    """
    total = 0
    for batch in batches if counted else ():
        valid = batch.targets != IGNORE_INDEX
        columns = (batch.tokens[valid], batch.targets[valid], batch.position_ids[valid])
        mixed = np.zeros(int(valid.sum()), np.uint64)
        for column, odd in zip(columns, _MIX, strict=True):
            mixed = (mixed ^ column.numpy().astype(np.uint64)) * odd
            mixed ^= mixed >> np.uint64(31)
        # A sum does not depend on the order of the samples.
        total += int(mixed.sum(dtype=np.uint64))
    return f"{sequence_length}:{sum(ranks.all_gather(total)) % 2**64:016x}"
