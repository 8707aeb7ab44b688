"""The page's figures: lengths of documents, frequencies of tokens, and the epochs of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..page.figures import BLUE, FAINT, GREY, ORANGE, page_style, to_svg
from ..page.markup import allowed
from .lengths import LengthFacts
from .token_counts import TokenFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .training_plan import TrainingPlan

_LINES = 6
"""Sources whose names fit into a figure."""


def draw_lengths(lengths: LengthFacts, sequence_length: int | None) -> str:
    """Histogram of the documents' lengths, and the share of tokens in documents up to each length.

    Args:
        lengths: of at least one document.
        sequence_length: of a run, which is marked.
    """
    with page_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.4, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_histogram(left, lengths)
        _draw_shares(right, lengths, sequence_length)
        return to_svg(figure, "Lengths of documents")


def draw_frequencies(tokens: TokenFacts) -> str:
    """How often the id of each rank occurs: Zipf's plot."""
    with page_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.4, 3.0), layout="constrained")
        axis = figure.subplots()
        ranks, counts = zip(*tokens.curve, strict=True)
        axis.loglog(ranks, [count / tokens.tokens for count in counts], color=BLUE)
        axis.set_xlabel("rank of the token")
        axis.set_title("Share of the tokens")
        _plain_ticks(axis)
        return to_svg(figure, "Frequency of tokens by rank")


def draw_epochs(plan: TrainingPlan) -> str:
    """How often each source has been gone through, over the run."""
    with page_style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        figure = Figure(figsize=(9.4, 3.0), layout="constrained")
        axis = figure.subplots()
        tokens = [at for at, _ in plan.curve]
        # This dataset first, so that it has its colour whatever its place.
        order = sorted(range(len(plan.sources)), key=lambda place: not plan.sources[place].is_this)
        colours = [BLUE, ORANGE, FAINT, GREY]
        for number, place in enumerate(order[:_LINES]):
            style = "-" if number < len(colours) else "--"
            values = [epochs[place] for _, epochs in plan.curve]
            name = plan.sources[place].name
            colour = colours[number % len(colours)]
            axis.plot(tokens, values, color=colour, linestyle=style, label=_plain(name))
        for stop in plan.stage_stops[:-1]:
            axis.axvline(stop, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        axis.set_title("Epochs of each source")
        axis.set_xlabel("tokens of the run")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlim(0, tokens[-1])
        axis.set_ylim(bottom=0)
        axis.tick_params(length=0)
        axis.legend(loc="upper left")
        return to_svg(figure, "Epochs of each source over the run")


def _draw_histogram(axis: Axes, lengths: LengthFacts) -> None:
    bins = lengths.histogram
    tokens = max(1, sum(bin_.tokens for bin_ in bins))
    places = range(len(bins))
    series = (
        ([bin_.documents / lengths.documents for bin_ in bins], BLUE, "of the documents", -0.2),
        ([bin_.tokens / tokens for bin_ in bins], ORANGE, "of the tokens", 0.2),
    )
    for heights, colour, label, offset in series:
        axis.bar([place + offset for place in places], heights, width=0.4, color=colour, label=label)
    step = -(-len(bins) // 7)  # labels that have room
    axis.set_xticks(list(places)[::step], [_short(bin_.first) for bin_ in bins[::step]])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("tokens in a document, from")
    axis.set_title("Share")
    axis.tick_params(length=0)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(top=1.25 * max(max(heights) for heights, *_ in series))
    axis.legend(loc="upper right", ncols=2)


def _draw_shares(axis: Axes, lengths: LengthFacts, sequence_length: int | None) -> None:
    marks, shares = zip(*lengths.curve, strict=True)
    # A step up at every length, from nothing below the shortest.
    axis.step([max(1, marks[0]), *(max(1, mark) for mark in marks)], [0, *shares], where="post", color=ORANGE)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.xaxis.set_major_formatter(lambda value, _: _short(round(value)))
    axis.set_xlabel("tokens in a document")
    axis.set_title("Tokens in documents up to this length")
    median = max(1.0, lengths.percentiles[50])
    axis.axvline(median, color=FAINT, linestyle=(0, (1, 2)), linewidth=1.2, label=f"median document {median:,.0f}")
    if sequence_length is not None:
        label = f"sequence_length {sequence_length:,}"
        axis.axvline(sequence_length, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
    axis.tick_params(length=0, which="both")
    axis.legend(loc="upper left")  # where a rising curve is not


def _plain_ticks(axis: Axes) -> None:
    """1, 10, 1k, 1M below; 0.01%, 1% beside."""
    axis.xaxis.set_major_formatter(lambda value, _: _short(round(value)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.12f}".rstrip("0").rstrip(".") + "%")
    axis.tick_params(length=0, which="both")


def _short(number: int) -> str:
    """4096 -> 4,096; powers of two and of ten beyond with a letter: 65536 -> 64k."""
    for letter, binary, decimal in (("G", 1 << 30, 10**9), ("M", 1 << 20, 10**6), ("k", 1 << 10, 10**3)):
        for unit in (binary, decimal):
            if number >= unit and number % unit == 0:
                return f"{number // unit}{letter}"
    return f"{number:,}"


def _plain(name: str) -> str:
    """A name that matplotlib takes as it stands: no mathematics, and no first underscore, which would hide it."""
    shown = allowed(name).replace("$", r"\$")
    return shown if not shown.startswith("_") else f" {shown}"
