"""The record of the best evaluation.

Losses of other texts, of more of them, or of shorter windows cannot be compared. A record therefore carries a
fingerprint of what it was measured on, and starts over when that changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.linear_cross_entropy import IGNORE_INDEX
from .data.packing import MicroBatch
from .parallel.process_group import Ranks

_MIX = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Odd constants of splitmix64 (Steele, Lea and Flood, 2014)."""


@dataclass(frozen=True)
class Measure:
    """What decides which evaluation is the best: the loss of the first validation set."""

    name: str
    fingerprint: str
    """Of all (token, target, position) of the set that are evaluated."""

    def describes(self, best: Mapping[str, Any]) -> bool:
        """Whether the record ``best`` is of this measure. Records of versions without fingerprints go by the name."""
        return best.get("name") == self.name and best.get("measured", self.fingerprint) == self.fingerprint

    def improves(self, best: Mapping[str, Any], loss: float) -> bool:
        """Whether ``loss`` takes the place of the record ``best``."""
        return not self.describes(best) or loss < best["loss"]

    def record(self, step: int, loss: float) -> dict[str, Any]:
        """The record of an evaluation, in JSON's types."""
        return {"step": step, "name": self.name, "loss": loss, "measured": self.fingerprint}

    def note_on(self, best: Mapping[str, Any]) -> list[str]:
        """A line for the log where the record ``best`` of a checkpoint cannot be continued."""
        if not best or self.describes(best):
            return []
        reason = "of another set" if best.get("name") != self.name else "of other data, eval_tokens or sequence_length"
        return [
            f"note: the record of the best evaluation starts over with {self.name}: {best.get('name')} "
            f"{best.get('loss', float('nan')):.4f} of step {best.get('step')} is {reason}"
        ]


def fingerprint(batches: Iterable[MicroBatch], counted: bool, sequence_length: int, ranks: Ranks) -> str:
    """A hash of what is evaluated, which depends neither on the number of ranks nor on the micro-batch.

    Args:
        batches: of this rank.
        counted: whether this rank counts its samples; of ranks that read the same ones, one does.
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
    return f"{sequence_length}:{sum(ranks.gather(total)) % 2**64:016x}"
