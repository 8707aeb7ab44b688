"""Figures for pages: drawn by matplotlib, written as SVG that takes its colours from the page, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...engine.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "#0f0f01": "var(--ink)",
    "#0f0f02": "var(--faint)",
    "#0f0f03": "var(--rule)",
    "#0f0f04": "var(--grey)",
    "#0f0f05": "var(--blue)",
    "#0f0f06": "var(--orange)",
    "#0f0f07": "var(--paper)",
}
"""matplotlib knows no CSS variables: it draws in these placeholders, which become variables in the finished SVG."""

INK, FAINT, RULE, GREY, BLUE, ORANGE, PAPER = COLOURS


def require_matplotlib() -> None:
    """Raise :class:`UserError` where matplotlib is missing; worth a call before minutes of work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "the page's figures are drawn with matplotlib, which is not installed: run pip install matplotlib"
        ) from None


@contextmanager
def page_style() -> Iterator[None]:
    """Within it, figures are drawn as they shall look on a page."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "retemper",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": FAINT,
            "axes.edgecolor": RULE,
            "xtick.color": RULE,
            "ytick.color": RULE,
            "xtick.labelcolor": FAINT,
            "ytick.labelcolor": FAINT,
            "grid.color": RULE,
            "grid.linewidth": 0.6,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "legend.frameon": False,
            "lines.linewidth": 1.5,
        }
    ):
        yield


def to_svg(figure: Figure, label: str) -> str:
    """``figure`` as an ``<svg>`` element to stand in HTML, inside :func:`page_style`.

    ``label`` tells what it shows, and is another for each figure of a page.

    Its colours are the CSS variables of :data:`COLOURS`, its text is text, and the same figure gives the same bytes.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration and document type
    for placeholder, variable in COLOURS.items():
        text = text.replace(placeholder, variable)
    # Every figure names its parts figure_1, axes_1 and so on; a page may have a name but once.
    prefix = re.sub(r"\W+", "-", label).lower()
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
