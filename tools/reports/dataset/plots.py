"""Draw the charts of a dataset's page: document lengths, token frequencies, and the epochs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..charts import COLORS, Axis, ChartLine, Mark, Point, bar_chart, line_chart, percent
from .lengths import LengthFacts
from .token_counts import TokenFacts

if TYPE_CHECKING:
    from .training_plan import TrainingPlan

_HALF, _LOW = (450, 270), (920, 260)
_SOURCES = 6
"""Maximum number of sources in a legend."""


def draw_lengths(lengths: LengthFacts, sequence_length: int | None) -> str:
    """Draw a histogram of document lengths, and the share of tokens in documents up to each length.

    Args:
        lengths: facts about at least one document.
        sequence_length: of a run; marked in the chart.
    """
    bins, tokens = lengths.histogram, max(1, sum(bin_.tokens for bin_ in lengths.histogram))
    shares = {
        "of the documents": [bin_.documents / lengths.documents for bin_ in bins],
        "of the tokens": [bin_.tokens / tokens for bin_ in bins],
    }
    histogram = bar_chart("Share", [short(bin_.first) for bin_ in bins], shares, "tokens in a document, from", _HALF)
    median = max(1.0, lengths.percentiles[50])
    marks = [Mark(median, f"median document {median:,.0f}")]
    marks += [] if sequence_length is None else [Mark(sequence_length, f"sequence_length {sequence_length:,}")]
    curve = ChartLine("", _stairs([(max(1, length), share) for length, share in lengths.curve]), "orange")
    axes = Axis("tokens in a document", log=2, write=lambda value: short(round(value))), Axis(start=0, write=percent)
    rising = line_chart("Tokens in documents up to this length", [curve], *axes, marks, _HALF)
    return f'<div class="charts">{histogram}{rising}</div>'


def draw_frequencies(tokens: TokenFacts) -> str:
    """Draw how often the token of each rank occurs (Zipf plot)."""
    points = [(rank, count / tokens.tokens) for rank, count in tokens.curve]
    across = Axis("rank of the token", log=10, write=lambda value: short(round(value)))
    return line_chart("Share of the tokens", [ChartLine("", points)], across, Axis(log=10, write=percent), size=_LOW)


def draw_epochs(plan: TrainingPlan) -> str:
    """Draw the epochs of each source over the run."""
    # This dataset comes first, so that it always has the same color.
    order = sorted(range(len(plan.sources)), key=lambda place: not plan.sources[place].is_this)[:_SOURCES]
    lines = [
        ChartLine(
            plan.sources[place].name,
            [(at, epochs[place]) for at, epochs in plan.curve],
            COLORS[number % len(COLORS)],
            dashed=number >= len(COLORS),
        )
        for number, place in enumerate(order)
    ]
    marks = [Mark(stop) for stop in plan.stage_stops[:-1]]
    return line_chart("Epochs of each source", lines, Axis("tokens of the run", start=0), Axis(start=0), marks, _LOW)


def _stairs(points: Sequence[Point]) -> list[Point]:
    """Return a step function through the points, 0 before the first."""
    corners: list[Point] = []
    for at, value in points:
        corners += [(at, corners[-1][1] if corners else 0.0), (at, value)]
    return corners


def short(number: int) -> str:
    """Format a number; multiples of 1,024 or 1,000 get a letter: 65536 -> 64k, 4095 -> 4,095."""
    for letter, binary, decimal in (("G", 1 << 30, 10**9), ("M", 1 << 20, 10**6), ("k", 1 << 10, 10**3)):
        for unit in (binary, decimal):
            if number >= unit and number % unit == 0:
                return f"{number // unit}{letter}"
    return f"{number:,}"
