"""The report's figure: what a run's metrics file says, drawn as one SVG that follows the page's colours.

The metrics file holds one JSON object per line. Training lines carry ``step, tokens, loss, learning_rate, grad_norm,
tokens_per_second``; evaluation lines carry ``step, tokens, evaluation`` (a name), ``loss, perplexity``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.errors import UserError
from ..page.figures import BLUE, COLOURS, FAINT, GREY, ORANGE, PAPER, RULE, page_style, require_matplotlib, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "Interruption", "Metrics", "TrainingPoint", "draw_curves", "read_metrics", "require_matplotlib"]


@dataclass(frozen=True)
class Interruption:
    """A run that was killed and resumed, in consumed tokens."""

    killed_at: int
    resumed_at: int
    """Below ``killed_at`` where the steps since the last checkpoint were lost and done again."""


@dataclass(frozen=True)
class TrainingPoint:
    """One training line of the metrics file."""

    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


@dataclass(frozen=True)
class Metrics:
    """A run's curves: training points, and ``(tokens, loss)`` of each evaluation by its name, in order of tokens."""

    training: Sequence[TrainingPoint]
    evaluations: dict[str, list[tuple[int, float]]]


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file. Of a step that a resumed run did again, the last line counts."""
    training: dict[int, TrainingPoint] = {}
    evaluations: dict[str, dict[int, float]] = {}
    for record in _read_records(path):
        if "evaluation" in record:
            evaluations.setdefault(record["evaluation"], {})[record["tokens"]] = record["loss"]
        elif "loss" in record:
            values = {name: record[name] for name in TrainingPoint.__dataclass_fields__}
            training[record["tokens"]] = TrainingPoint(**values)
    return Metrics(
        training=[training[tokens] for tokens in sorted(training)],
        evaluations={name: sorted(points.items()) for name, points in evaluations.items()},
    )


def draw_curves(metrics: Metrics, interruptions: Sequence[Interruption]) -> str:
    """Draw loss, learning rate, gradient norm and speed over tokens; return an ``<svg>`` element to stand in HTML.

    Its colours are the CSS variables of :data:`COLOURS`, its text is text, and the same metrics give the same bytes.
    """
    with page_style():
        from matplotlib.figure import Figure  # without pyplot: no display, no global state

        figure = Figure(figsize=(9.4, 6.2), layout="constrained")
        _draw_panels(figure, metrics, interruptions)
        return to_svg(figure, "Curves of the run")


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the run's metrics: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); was the file cut off?") from None
    return records


def _draw_panels(figure: Figure, metrics: Metrics, interruptions: Sequence[Interruption]) -> None:
    axes = figure.subplot_mosaic([["loss"] * 3, ["rate", "norm", "speed"]], height_ratios=[2.1, 1])
    tokens = [point.tokens for point in metrics.training]

    loss = axes["loss"]
    loss.plot(tokens, [point.loss for point in metrics.training], color=GREY, linewidth=1.1, label="training")
    for name, colour in (("domain", BLUE), ("general", ORANGE)):
        if name in metrics.evaluations:
            consumed, losses = zip(*metrics.evaluations[name], strict=True)
            loss.plot(consumed, losses, color=colour, marker="o", markersize=4, label=f"{name}, validation")
    loss.set_ylabel("nats per token")
    loss.set_title("Loss")

    for panel, attribute, title in (
        ("rate", "learning_rate", "Learning rate"),
        ("norm", "grad_norm", "Gradient norm"),
        ("speed", "tokens_per_second", "Tokens per second"),
    ):
        axes[panel].plot(tokens, [getattr(point, attribute) for point in metrics.training], color=GREY)
        axes[panel].set_title(title)
        axes[panel].set_ylim(bottom=0)

    for panel, axis in axes.items():
        _format_ticks(axis)
        for interruption in interruptions:
            _mark_interruption(axis, interruption, labelled=panel == "loss")
    loss.set_xlabel("tokens consumed")
    loss.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)  # beside the title, over no curve


def _format_ticks(axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.5M
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.yaxis.set_major_formatter(EngFormatter(sep="") if axis.get_ylim()[1] >= 1000 else "{x:g}")
    axis.tick_params(length=0)
    axis.margins(x=0.02)


def _mark_interruption(axis: Axes, interruption: Interruption, labelled: bool) -> None:
    """Draw a dashed line where the run was killed, and a shade over the steps that were done again."""
    axis.axvline(interruption.killed_at, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
    redone = interruption.killed_at - interruption.resumed_at
    if redone:
        axis.axvspan(interruption.resumed_at, interruption.killed_at, color=RULE, alpha=0.6, linewidth=0)
    if labelled:
        left, right = axis.get_xlim()
        towards_right = interruption.killed_at < (left + right) / 2  # where there is room for the words
        axis.annotate(
            f"killed, resumed {redone:,} tokens earlier" if redone else "killed, resumed here",
            (interruption.killed_at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(6 if towards_right else -6, -4),
            textcoords="offset points",
            ha="left" if towards_right else "right",
            va="top",
            color=FAINT,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
        )
