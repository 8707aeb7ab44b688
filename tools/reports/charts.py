"""Draw line and bar charts as SVG in HTML, with linear or logarithmic axes, in the colors of the page.

No plotting library is needed, and a chart takes milliseconds. Titles and legends are HTML, which wraps and can be
searched. A long curve is divided into :data:`MOST_POINTS` parts, and drawn as their means in a band from their lowest
to their highest values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .page import escape

Point = tuple[float, float]
COLORS = ("blue", "orange", "green", "violet", "red")
"""CSS variables of the page, used in this order for the series of a chart."""
WIDE, SMALL = (920, 300), (300, 190)
"""Width and height of a full-width chart, and of one of three side by side."""
MOST_POINTS = 460
_CHARACTER = 6.2  # width of a digit in 11 px text
_TOP, _RIGHT, _BOTTOM = 8, 12, 22


def compact(number: float) -> str:
    """Format a number: 1500000 -> '1.5M', 0.0004 -> '0.0004'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:.4g}"


def percent(share: float) -> str:
    """Format a share: 0.25 -> '25%', 0.0001 -> '0.01%'."""
    return f"{100 * share:.12f}".rstrip("0").rstrip(".") + "%"


def signed(number: float) -> str:
    """Format a change: 2.5 -> '+2.5'."""
    return f"{number:+.4g}"


@dataclass(frozen=True)
class Axis:
    """Range and number format of an axis."""

    label: str = ""
    log: int = 0
    """Base of a logarithmic axis; 0: linear."""
    start: float | None = None
    """Lowest value shown. None: that of the data."""
    write: Callable[[float], str] = compact


@dataclass(frozen=True)
class ChartLine:
    """A curve; points with NaN values are left out."""

    label: str
    points: Sequence[Point]
    color: str = "blue"
    dashed: bool = False
    dots: bool = False
    """Whether each point has a marker with its value as a tooltip."""


@dataclass(frozen=True)
class Mark:
    """A vertical line, with shading from ``since`` to it."""

    at: float
    label: str = ""
    since: float | None = None


class _Scale:
    """Maps the values of an axis to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, stop: float) -> None:
        self.axis, self._start, self._stop = axis, start, stop
        self._low = self._position(min(values) if axis.start is None else axis.start)
        self._high = self._position(max(values))
        if self._high <= self._low:
            self._high = self._low + (abs(self._low) * 0.1 or 1.0)
        margin = 0.04 * (self._high - self._low)
        self._high += margin
        self._low -= margin if axis.start is None else 0.0

    def _position(self, value: float) -> float:
        return math.log(value, self.axis.log) if self.axis.log else value

    def __call__(self, value: float) -> float:
        share = (self._position(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._stop - self._start), 1)

    def ticks(self, most: int) -> list[float]:
        """Return about ``most`` round values at most."""
        base = self.axis.log
        if base and math.floor(self._high) > math.ceil(self._low):
            powers = range(math.ceil(self._low), math.floor(self._high) + 1)
            return [float(base) ** power for power in powers[:: -(-len(powers) // most)]]
        low, high = (base**edge if base else edge for edge in (self._low, self._high))
        rough = (high - low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.9)
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return [number * step for number in numbers]


@dataclass
class _Drawing:
    """An SVG under construction."""

    title: str
    size: tuple[int, int]
    bottom: int = 0
    """Vertical position of the horizontal axis."""
    legend: list[str] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)

    def add(self, tag: str, style: str, content: str = "", **attributes: object) -> None:
        """Add an element; ``style`` is CSS. Underscores in the names of attributes become hyphens."""
        named = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.elements.append(f'<{tag} style="{style}"{named}>{content}</{tag}>')

    def write(self, text: str, x: float, y: float, anchor: str = "middle") -> None:
        """Add a text."""
        self.add("text", f"text-anchor:{anchor}", escape(text), x=x, y=y)

    def name(self, label: str, style: str) -> None:
        """Add a label to the legend."""
        self.legend.append(f'<span class="key"><i style="border-top:{style}"></i>{escape(label)}</span>')

    def html(self) -> str:
        """Return the figure as HTML."""
        width, height = self.size
        legend = f'<span class="legend">{"".join(self.legend)}</span>' if self.legend else ""
        return (
            f'<figure class="chart"><figcaption><strong>{escape(self.title)}</strong>{legend}</figcaption>\n'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self.title)}">\n'
            + "\n".join(self.elements)
            + "\n</svg></figure>"
        )


def line_chart(
    title: str,
    lines: Sequence[ChartLine],
    x: Axis | None = None,
    y: Axis | None = None,
    marks: Sequence[Mark] = (),
    size: tuple[int, int] = WIDE,
) -> str:
    """Draw ``lines`` in common axes; empty if no line has a point."""
    lines = [ChartLine(line.label, _finite(line.points), line.color, line.dashed, line.dots) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    drawing = _Drawing(title, size)
    across, up = _frame(drawing, x or Axis(), y or Axis(), [at for at, _ in points], [value for _, value in points])
    for number, mark in enumerate(marks):
        _draw_mark(drawing, mark, across, _TOP + 10 + 14 * (number % 5))
    for line in lines:
        _draw_line(drawing, line, across, up)
        if line.label:
            drawing.name(line.label, f"2px {'dashed' if line.dashed else 'solid'} var(--{line.color})")
    return drawing.html()


def bar_chart(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    x_label: str,
    size: tuple[int, int],
    write: Callable[[float], str] = percent,
) -> str:
    """Draw a group of bars for each of ``labels``, with one bar for each of ``series``; by default values are shares.

    Bars begin at zero, and those of negative values are below it. ``write`` formats values.
    """
    drawing = _Drawing(title, size)
    heights = [value for values in series.values() for value in values]
    places = [-0.5, len(labels) - 0.5]
    negative = min(heights, default=0.0) < 0
    vertical = Axis(start=None if negative else 0, write=write)
    across, up = _frame(drawing, Axis(x_label), vertical, places, [*heights, 0.0] if negative else heights, labels)
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        drawing.name(name, f"8px solid var(--{COLORS[number]})")
        for place, value in enumerate(values):
            left = place - 0.4 + number * width
            box = {"width": round(across(left + width) - across(left), 1), "height": round(abs(up(0) - up(value)), 1)}
            tip = f"<title>{escape(f'{labels[place]}, {name}: {write(round(value, 4))}')}</title>"
            drawing.add("rect", f"fill:var(--{COLORS[number]})", tip, x=across(left), y=up(max(value, 0.0)), **box)
    return drawing.html()


def thinned(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Return the curve to draw, and the outline of the band around it, which is empty for a short curve."""
    if len(points) <= MOST_POINTS:
        return list(points), []
    edges = [len(points) * part // MOST_POINTS for part in range(MOST_POINTS + 1)]
    parts = [points[start:stop] for start, stop in pairwise(edges)]
    centers = [math.fsum(at for at, _ in part) / len(part) for part in parts]
    means = [math.fsum(value for _, value in part) / len(part) for part in parts]
    highest = [max(value for _, value in part) for part in parts]
    lowest = [min(value for _, value in part) for part in parts]
    band = [*zip(centers, highest, strict=True), *zip(reversed(centers), reversed(lowest), strict=True)]
    return list(zip(centers, means, strict=True)), band


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(at, value) for at, value in points if math.isfinite(value)]


def _frame(
    drawing: _Drawing,
    x: Axis,
    y: Axis,
    across_values: Sequence[float],
    up_values: Sequence[float],
    labels: Sequence[str] = (),
) -> tuple[_Scale, _Scale]:
    """Draw the axes with their ticks; return both scales. ``labels`` name the whole numbers, if given."""
    width, height = drawing.size
    drawing.bottom = bottom = height - _BOTTOM - (14 if x.label else 0)
    up = _Scale(y, up_values, bottom, _TOP)
    rows = [(value, y.write(value)) for value in up.ticks(max(3, height // 55))]
    left = 8 + max((len(text) for _, text in rows), default=1) * _CHARACTER
    across = _Scale(x, across_values, left, width - _RIGHT)
    for value, text in rows:
        drawing.add("line", "stroke:var(--rule)", x1=left, x2=width - _RIGHT, y1=up(value), y2=up(value))
        drawing.write(text, left - 6, up(value) + 4, "end")
    step = max(1, -(-len(labels) * 60 // width))
    named = [(float(place), labels[place]) for place in range(0, len(labels), step)]
    for value, text in named or [(value, x.write(value)) for value in across.ticks(max(4, width // 110))]:
        drawing.write(text, across(value), bottom + 15)
    drawing.add("line", "stroke:var(--grey)", x1=left, x2=width - _RIGHT, y1=bottom, y2=bottom)
    if x.label:
        drawing.write(x.label, (left + width - _RIGHT) / 2, height - 4)
    return across, up


def _draw_line(drawing: _Drawing, line: ChartLine, across: _Scale, up: _Scale) -> None:
    curve, band = thinned(line.points)
    color = f"var(--{line.color})"
    if band:
        drawing.add("path", f"fill:{color};opacity:.18", d=f"M{' L'.join(_placed(band, across, up))}Z")
    dashes = ";stroke-dasharray:5 4" if line.dashed else ""
    path = f"M{' L'.join(_placed(curve, across, up))}"
    drawing.add("path", f"fill:none;stroke:{color};stroke-width:1.6;stroke-linejoin:round{dashes}", d=path)
    for at, value in curve if line.dots else ():
        tip = f"<title>{escape(f'{line.label} {value:.4f} at {at:,.0f}')}</title>"
        drawing.add("circle", f"fill:{color}", tip, cx=across(at), cy=up(value), r=3)


def _placed(points: Sequence[Point], across: _Scale, up: _Scale) -> Iterator[str]:
    return (f"{across(at)} {up(value)}" for at, value in points)


def _draw_mark(drawing: _Drawing, mark: Mark, across: _Scale, label_y: float) -> None:
    top, bottom, at = _TOP, drawing.bottom, across(mark.at)
    if mark.since is not None and mark.since < mark.at:
        since = across(mark.since)
        width, height = round(at - since, 1), bottom - top
        drawing.add("rect", "fill:var(--rule);opacity:.6", x=since, y=top, width=width, height=height)
    drawing.add("line", "stroke:var(--faint);stroke-dasharray:4 3", x1=at, x2=at, y1=top, y2=bottom)
    if mark.label:
        is_left = at < drawing.size[0] / 2  # the label is on the side with more space
        drawing.write(mark.label, at + (6 if is_left else -6), label_y, "start" if is_left else "end")
