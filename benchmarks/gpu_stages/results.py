"""Read the outputs of stages: the headline figure of each, and whether it shows an error."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .plan import Kind

OURS = "retemper"
_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
_LINE = re.compile(
    rf"^(?:\[gw\d+\] \[ *\d+%\] (?P<early>{_OUTCOMES}) (?P<named>tests/.+?)"
    rf"|(?P<name>tests/.+?::.+?) (?P<late>{_OUTCOMES})\b.*?) *$",
    re.MULTILINE,
)
"""A test's line in the output of ``pytest -vv``, with and without pytest-xdist."""


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a stage's report; None if there is none, or only a part of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def headline(kind: Kind, result: dict[str, Any] | None, log: str) -> str:
    """Return the most important figures of a stage in a few words; empty if it has none."""
    if kind == "tests":
        return _tests(log)
    describe: dict[str, Callable[[dict[str, Any]], str]] = {
        "ceilings": _ceilings,
        "step": _step,
        "kernels": _kernels,
        "profile": _profile,
        "mixture": _mixture,
    }
    return describe[kind](result) if result and kind in describe else ""


def problem(kind: Kind, result: dict[str, Any] | None, log: str) -> str | None:
    """Return the error of correctness that the output of a stage shows, if any."""
    if kind == "tests":
        failed = [name for name, outcome in outcomes(log).items() if outcome in ("FAILED", "ERROR")]
        return f"failed: {', '.join(failed[:5])}{' and more' if len(failed) > 5 else ''}" if failed else None
    rows = result["rows"] if result else []
    if kind == "step":
        ours = next((row for row in rows if row["engine"] == OURS), {"problem": "no result was written"})
        return None if "rate" in ours else f"{OURS}: {ours['problem']}"
    if kind == "kernels":
        wrong = [f"{row['case']}: {row['provider']}" for row in rows if row["wrong"]]
        return f"outside the bounds of correctness: {'; '.join(wrong)}" if wrong else None
    return None


def outcomes(log: str) -> dict[str, str]:
    """Return the outcome of every test that a log of ``pytest -vv`` names, also of a run that was cut off."""
    return {match["named"] or match["name"]: match["early"] or match["late"] for match in _LINE.finditer(log)}


def _tests(log: str) -> str:
    counts = Counter(outcomes(log).values())
    return ", ".join(f"{counts[name]} {name.lower()}" for name in sorted(counts))


def _ceilings(result: dict[str, Any]) -> str:
    rates = [row["flops_per_second"] for row in result["rows"]]
    copied = result["summary"].get("copy_bytes_per_second")
    return f"{max(rates) / 1e12:.3g} TFLOP/s" + (f", {copied / 1e12:.3g} TB/s" if copied else "") if rates else ""


def _step(result: dict[str, Any]) -> str:
    missing = [f"{engine}: {reason}" for engine, reason in result["settings"].get("missing", {}).items()]
    return "; ".join([*map(_engine, result["rows"]), *missing])


def _engine(row: dict[str, Any]) -> str:
    if "rate" not in row:
        return row["problem"]
    times = [1e3 * seconds for run in row["runs"] for seconds in run["step_seconds"]]
    text = (
        f"{row['rate']:,.0f} tokens/s ({min(times):,.1f} to {max(times):,.1f} ms), {row['peak_bytes'] / 2**30:.1f} GiB"
    )
    text += f", recomputation {row['recompute']}"
    compared = row["engine"] != OURS and "ours_times_as_fast" in row
    return f"{text}, ours {row['ours_times_as_fast']:.2f} x" if compared else text


def _kernels(result: dict[str, Any]) -> str:
    cases: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["milliseconds"] is not None:
            cases.setdefault(row["case"], []).append(f"{row['provider']} {row['milliseconds']:.3g}")
    return "; ".join(f"{case}: {', '.join(found)} ms" for case, found in cases.items())


def _profile(result: dict[str, Any]) -> str:
    parts = result["summary"]["breakdown_seconds"]
    return ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in parts.items()) + " ms"


def _mixture(result: dict[str, Any]) -> str:
    rows = result["rows"]
    return "; ".join(
        f"{row['layer']} {1e3 * row['seconds']:.3g} ms, {row['peak_mb']:,.0f} MB ({row['relative_time']:.2f} x)"
        for row in rows
    )


def step_rate(result: dict[str, Any] | None) -> float | None:
    """Return the tokens/s of our engine in a stage's report."""
    rows: Sequence[dict[str, Any]] = result["rows"] if result else []
    return next((row["rate"] for row in rows if row["engine"] == OURS and "rate" in row), None)
