"""Compare validation losses with those before the training: what a run has learned and forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNCHANGED = 0.0005
"""Smaller changes of a loss, in nats, count as no change: they print as 0.000."""
CHANGE_HEAD = ("learned and forgotten", "before", "after", "change", "%", "")


@dataclass(frozen=True)
class LossChange:
    """A validation loss before the training and now, in nats per token."""

    before: float
    after: float

    @property
    def change(self) -> float:
        """Return the change in nats."""
        return self.after - self.before

    @property
    def percent(self) -> float:
        """Return the change in percent of the loss before."""
        return 100 * self.change / self.before if self.before else math.nan

    @property
    def outcome(self) -> str:
        """Return ``learned``, ``forgotten`` (the loss rose) or ``unchanged``; ``not comparable`` if one is NaN."""
        if math.isnan(self.change):
            return "not comparable"
        if abs(self.change) < UNCHANGED:
            return "unchanged"
        return "learned" if self.change < 0 else "forgotten"

    def cells(self) -> tuple[str, str]:
        """Return the change in nats and in percent, for a table."""
        return f"{self.change:+.3f}", f"{self.percent:+.1f} %"

    def to_dict(self) -> dict[str, float]:
        """Return the losses and their difference, for JSON."""
        return {"before": self.before, "after": self.after, "change": self.change}


def part_of(name: str, names: Mapping[str, Any]) -> str | None:
    """Return the set that the evaluation ``name`` is a part of, as ``set/source``; None for a set.

    Args:
        name: of an evaluation.
        names: of all evaluations.
    """
    whole, slash, _ = name.partition("/")
    return whole if slash and whole in names else None


def change_rows(changes: Mapping[str, LossChange]) -> list[tuple[str, ...]]:
    """Return the rows of a table with :data:`CHANGE_HEAD`."""
    return [(name, f"{one.before:.3f}", f"{one.after:.3f}", *one.cells(), one.outcome) for name, one in changes.items()]
