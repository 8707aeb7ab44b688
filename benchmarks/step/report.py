"""Format the results of the step benchmark as Markdown tables for terminals and files, and as a record for JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from ...engine.config.settings import RunConfig, to_dict
from ..machine import one_line
from ..report import BenchmarkReport, table
from .measure import Measurement
from .options import StepBenchmarkOptions
from .phases import PHASES

_GIB = 2**30


def summarize(found: Measurement) -> dict[str, Any]:
    """Return the figures: rates of the median step, and the breakdown of the mean step, so that its parts sum to it.

    ``mfu`` holds two shares by convention: of the datasheet's peak (bf16 only, for known GPUs), and of the best
    measured matrix product in the dtype that the model computes in.
    """
    seconds = [step.seconds for step in found.steps]
    median = statistics.median(seconds)
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    peaks = {}
    if found.datasheet is not None and found.precision == "bf16":
        peaks["datasheet"] = found.datasheet[1]
    measured = [rate.flops_per_second for rate in found.matmul if rate.dtype == found.precision]
    if measured:
        peaks["matmul"] = max(measured)
    rates = {name: flops / median / found.ranks for name, flops in found.flops_per_step.items()}
    return {
        "tokens_per_second": found.tokens_per_step / median,
        "tokens_per_second_per_rank": found.tokens_per_step / median / found.ranks,
        "step_seconds": {
            "median": median,
            "lower_quartile": quarters[0],
            "upper_quartile": quarters[2],
            "least": min(seconds),
            "most": max(seconds),
            "mean": statistics.mean(seconds),
        },
        "breakdown_seconds": {name: statistics.mean(step.phases[name] for step in found.steps) for name in PHASES},
        "flops_per_token": {name: flops / found.tokens_per_step for name, flops in found.flops_per_step.items()},
        "flops_per_second_per_rank": rates,
        "peaks": peaks,
        "mfu": {name: {which: rate / peak for which, peak in peaks.items()} for name, rate in rates.items()},
        "peak_memory_bytes": max(value for name, value in found.memory.items() if name in ("resident", "reserved")),
    }


def to_report(
    found: Measurement, config: RunConfig, options: StepBenchmarkOptions, command: str, machine: dict[str, Any]
) -> BenchmarkReport:
    """Return all results, with one row for each step."""
    record = asdict(found)
    settings = {"config": to_dict(config), **asdict(options)}
    return BenchmarkReport(command, machine, settings, record.pop("steps"), {**summarize(found), **record})


def format_report(found: Measurement, machine: dict[str, Any]) -> str:
    """Return tables of speed, of the time of each part and of memory, with a description of the machine."""
    summary = summarize(found)
    lines = [
        one_line(machine),
        "",
        *found.plan,
        "",
        *table(["", "found"], _speed_rows(found, summary)),
        "",
        *table(["MFU", "FLOPs/token", *_peak_names(found, summary)], _mfu_rows(summary)),
        "",
        *table(["mean step", "ms", "share"], _phase_rows(summary)),
        "",
        found.flops_formula,
    ]
    if found.matmul:
        rates = ", ".join(f"{one.dtype} {one.size}: {one.flops_per_second / 1e12:,.3g}" for one in found.matmul)
        lines.append(f"matrix products measured, TFLOP/s: {rates}")
    return "\n".join(lines)


def _speed_rows(found: Measurement, summary: dict[str, Any]) -> list[list[str]]:
    times = {name: f"{1e3 * value:,.1f}" for name, value in summary["step_seconds"].items()}
    who = "GPU" if found.device != "cpu" else "rank"
    rows = [
        ["tokens/s", f"{summary['tokens_per_second']:,.0f}"],
        [f"tokens/s per {who} ({found.ranks})", f"{summary['tokens_per_second_per_rank']:,.0f}"],
        [f"step, median of {len(found.steps)}", f"{times['median']} ms"],
        ["step, middle half", f"{times['lower_quartile']} to {times['upper_quartile']} ms"],
        ["step, all", f"{times['least']} to {times['most']} ms"],
        ["tokens in a step", f"{found.tokens_per_step:,}"],
        ["documents in a step", f"{found.documents_per_step:,.1f}"],
        ["warm-up", f"{found.warmup_seconds:,.1f} s"],
    ]
    names = {
        "allocated": "peak memory allocated",
        "reserved": "peak memory reserved",
        "total": "memory of the GPU",
        "resident": "peak resident memory",
        "resident_before": "memory before the model was built",
    }
    return rows + [[names[name], f"{value / _GIB:,.2f} GiB"] for name, value in found.memory.items()]


def _peak_names(found: Measurement, summary: dict[str, Any]) -> list[str]:
    names = []
    for which, peak in summary["peaks"].items():
        where = f"{found.datasheet[0]} datasheet" if which == "datasheet" and found.datasheet else "measured matmul"
        names.append(f"of {where}, {found.precision}: {peak / 1e12:,.3g} TFLOP/s")
    return names


def _mfu_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [name, f"{summary['flops_per_token'][name]:.4g}", *(f"{share:.1%}" for share in shares.values())]
        for name, shares in summary["mfu"].items()
    ]


def _phase_rows(summary: dict[str, Any]) -> list[list[str]]:
    mean = summary["step_seconds"]["mean"]
    parts = [*summary["breakdown_seconds"].items(), ("all", sum(summary["breakdown_seconds"].values()))]
    return [[name, f"{1e3 * value:,.1f}", f"{value / mean:.1%}"] for name, value in parts]
