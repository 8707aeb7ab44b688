"""Format the results of the benchmark as Markdown tables for terminals and files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..machine import one_line
from ..report import BenchmarkReport, table
from .benchmark import PreprocessBenchmarkOptions, Results

WANTED_OF_LIMIT = 0.8
WANTED_OF_MEGATRON = 12.0
_LEAST_OF_START = 1.25


def summarize(results: Results) -> dict[str, float]:
    """Return rates and ratios. The best of several rounds counts, for each side.

    MB/s and MB per CPU-second are of whole runs, start included. Those ``_without_start`` subtract a run on one line.
    They exist only if the corpus takes at least a fourth of the start's time, since otherwise they are noise.
    Megatron-LM's loop may have processed only the beginning of the corpus. Its wall time on all of it is that of its
    start, plus the rest scaled in proportion.
    """
    size = results.corpus.text_bytes / 1e6
    ours_cpu = min(cost.cpu_seconds for cost in results.ours)
    ours_wall = min(cost.wall_seconds for cost in results.ours)
    start_cpu = min(cost.cpu_seconds for cost in results.ours_start)
    found = {
        "limit_mb_per_cpu_second": max(one["text_bytes"] / 1e6 / one["cpu_seconds"] for one in results.limit),
        "limit_mb_per_second": max(one["text_bytes"] / 1e6 / one["wall_seconds"] for one in results.limit),
        "ours_mb_per_cpu_second": size / ours_cpu,
        "ours_mb_per_second": size / ours_wall,
        "ours_start_cpu_seconds": start_cpu,
        "ours_start_wall_seconds": min(cost.wall_seconds for cost in results.ours_start),
        "ours_peak_mb": max(cost.peak_mb for cost in results.ours),
    }
    found["ratio_to_limit"] = found["ours_mb_per_cpu_second"] / found["limit_mb_per_cpu_second"]
    if ours_cpu >= _LEAST_OF_START * start_cpu:
        without = size / (ours_cpu - start_cpu)
        found["ours_mb_per_cpu_second_without_start"] = without
        found["ratio_to_limit_without_start"] = without / found["limit_mb_per_cpu_second"]
    if results.megatron is not None and results.megatron_start is not None:
        part = results.megatron_text_bytes / 1e6
        start = results.megatron_start.wall_seconds
        wall = start + (results.megatron.wall_seconds - start) * size / part
        found |= {
            "megatron_mb_per_cpu_second": part / results.megatron.cpu_seconds,
            "megatron_mb_per_second": size / wall,
            "megatron_peak_mb": results.megatron.peak_mb,
            "wall_ratio_to_megatron": wall / ours_wall,
        }
    return found


def to_report(
    results: Results, options: PreprocessBenchmarkOptions, command: str, machine: dict[str, Any]
) -> BenchmarkReport:
    """Return all results, with one row for each process that was measured. Names the corpus, and no folder."""
    corpus = results.corpus
    settings = {
        "corpus": {"name": corpus.path.name, "documents": corpus.documents, "text_bytes": corpus.text_bytes},
        "megatron_text_bytes": results.megatron_text_bytes,
        **{name: getattr(options, name) for name in ("json_key", "repeat", "runs")},
        "workers": results.workers,
    }
    costs = {
        "preprocess": results.ours,
        "preprocess, one line": results.ours_start,
        "Megatron-LM's loop": [results.megatron] if results.megatron else [],
        "Megatron-LM's loop, one line": [results.megatron_start] if results.megatron_start else [],
    }
    rows = [{"program": "bare tokenizer", **one} for one in results.limit]
    rows += [{"program": program, **asdict(cost)} for program, some in costs.items() for cost in some]
    rows += [{"program": "preprocess, memory check", **asdict(use)} for use in results.memory]
    summary = {**summarize(results), "checks": results.checks}
    return BenchmarkReport(command, machine, settings, rows, summary)


def format_report(results: Results, machine: dict[str, Any]) -> str:
    """Return tables of speed and of memory, with a description of the machine."""
    found = summarize(results)
    corpus = results.corpus
    lines = [
        f"{corpus.path.name}: {corpus.documents:,} documents, {corpus.text_bytes / 1e6:,.1f} MB of text; "
        f"{results.workers} workers; {one_line(machine)}",
        "",
        *table(["", "MB/CPU-s", "MB/s", "peak memory"], _speed_rows(results, found)),
        "",
        *table(["", "found", "wanted"], _ratio_rows(found)),
    ]
    if results.memory:
        rows = [
            [
                use.what,
                f"{use.text_mb:,.0f} MB",
                f"{use.seconds:,.1f} s",
                f"{use.peak_mb:,.0f} MB",
                f"{use.peak_with_files_mb:,.0f} MB",
                f"{use.allowed_mb:,} MB",
            ]
            for use in results.memory
        ]
        lines += ["", *table(["memory", "text", "wall time", "peak", "with mapped files", "allowed"], rows)]
    return "\n".join([*lines, "", *(f"checked: {check}" for check in results.checks)])


def _speed_rows(results: Results, found: dict[str, float]) -> list[list[str]]:
    best = max(results.limit, key=lambda one: one["text_bytes"] / one["cpu_seconds"])
    settings = f"threads: {best['threads']}, batches of {best['batch_megacharacters']:g} M characters"

    def row(name: str, who: str, peak: str) -> list[str]:
        return [name, f"{found[f'{who}_mb_per_cpu_second']:.1f}", f"{found[f'{who}_mb_per_second']:.1f}", peak]

    rows = [
        row(f"{best['encoder']} alone, at best ({settings})", "limit", ""),
        row("tools/preprocess.py", "ours", f"{found['ours_peak_mb']:,.0f} MB"),
    ]
    start = f"the same without its start of {found['ours_start_cpu_seconds']:.1f} CPU-s"
    rows.append([start, _number(found, "ours_mb_per_cpu_second_without_start", 1), "", ""])
    if "megatron_mb_per_second" in found:
        rows.append(row("Megatron-LM's loop", "megatron", f"{found['megatron_peak_mb']:,.0f} MB"))
    return rows


def _ratio_rows(found: dict[str, float]) -> list[list[str]]:
    rows = [
        ["CPU time: share of the bare tokenizer's rate", _number(found, "ratio_to_limit", 2), f"{WANTED_OF_LIMIT}"],
        ["the same without start", _number(found, "ratio_to_limit_without_start", 2), f"{WANTED_OF_LIMIT}"],
    ]
    if "wall_ratio_to_megatron" in found:
        ratio = _number(found, "wall_ratio_to_megatron", 1)
        rows.append(["wall time: times as fast as Megatron-LM's loop", ratio, f"{WANTED_OF_MEGATRON:g}"])
    return rows


def _number(found: dict[str, float], name: str, digits: int) -> str:
    return f"{found[name]:.{digits}f}" if name in found else "corpus too small"
