"""Format the results as Markdown tables, and as a plot."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from pathlib import Path

from ...engine.files.outputs import GENERATOR, write_report
from ..report import table
from .measure import KernelResult


def format_results(results: Iterable[KernelResult]) -> str:
    """Return one table for each case."""
    parts = []
    for (kernel, case), group in itertools.groupby(results, key=lambda result: (result.kernel, result.case)):
        header = ["", "ms", "fastest .. slowest", "TFLOP/s", "MiB", "largest error", "same bits", ""]
        parts.append("\n".join([f"{kernel}: {case}", "", *table(header, [_cells(result) for result in group])]))
    return "\n\n".join(parts)


def _cells(result: KernelResult) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    spread = "" if result.spread is None else f"{result.spread[0]:.3f} .. {result.spread[1]:.3f}"
    if result.again_milliseconds is not None:
        spread += f", again {result.again_milliseconds:.3f}"
    name, error = max(result.errors.items(), key=lambda item: item[1], default=("", None))
    worst = "" if error is None else f"{name} {error:.1e}"
    megabytes = None if result.peak_bytes is None else result.peak_bytes / 2**20
    bits = {None: "", True: "yes", False: "no"}[result.same_bits]
    note = ("WRONG: " if result.wrong else "") + (result.problem or result.detail or "")
    times = [number(result.milliseconds, ".3f"), spread, number(result.teraflops, ".2f")]
    return [result.provider, *times, number(megabytes, ",.0f"), worst, bits, note]


def plot_results(results: Iterable[KernelResult], path: Path, title: str) -> None:
    """Plot bars of milliseconds, one panel for each case.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [result for result in results if result.milliseconds is not None]
    groups = [
        (name, list(group))
        for name, group in itertools.groupby(measured, key=lambda result: f"{result.kernel}: {result.case}")
    ]
    heights = [1 + 0.35 * len(group) for _, group in groups] or [1]
    figure, axes = pyplot.subplots(
        max(1, len(groups)), 1, figsize=(9, sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, (name, group) in zip(axes[:, 0], groups, strict=False):
        group = group[::-1]
        times = [result.milliseconds for result in group]
        colours = ["tab:blue" if result.is_ours else "tab:gray" for result in group]
        bars = axis.barh([result.provider for result in group], times, color=colours)
        axis.bar_label(bars, [f"{value:.3g} ms" for value in times], padding=3)
        axis.set_title(name, loc="left", fontsize=10)
        axis.margins(x=0.15)
    axes[-1, 0].set_xlabel(f"ms, forward and backward, median; {title}")
    figure.tight_layout()
    buffer, kind = io.BytesIO(), path.suffix[1:].lower() or "png"
    metadata = {"Software" if kind == "png" else "Creator": GENERATOR} if kind in ("png", "svg", "pdf") else None
    figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    pyplot.close(figure)
    write_report("--plot", path, buffer.getvalue())
