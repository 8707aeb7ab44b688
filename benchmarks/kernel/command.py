"""Run the kernel benchmark with the command's options, and print its tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from ...engine.errors import UserError, install_command
from ...engine.model.dtypes import DTYPES
from ..machine import describe_torch
from ..report import BenchmarkReport
from .cases import Case, cases
from .measure import KernelBenchmarkOptions, KernelResult, measure_case
from .providers import Provider
from .report import format_results, plot_results


def run(
    options: argparse.Namespace, keep: Callable[[list[KernelResult], list[str]], None] = lambda *_: None
) -> tuple[list[KernelResult], list[str]]:
    """Measure the selected cases; also return the names of cases for which no time was left.

    ``keep`` is called with both after every case, so that a run that is ended early keeps its results.

    Raises:
        UserError: a name of a case or provider is unknown.
    """
    settings = KernelBenchmarkOptions(options.device, options.dtype, options.seconds)
    torch.manual_seed(options.seed)
    started, results, left_out = time.monotonic(), [], []
    for case in selected_cases(options):
        if options.time_limit is not None and time.monotonic() - started > options.time_limit:
            left_out.append(f"{case.kernel}: {case.name}")
            continue
        results += measure_case(case, settings, say=_say, compiled=not options.no_compile)
        keep(results, left_out)
    return results, left_out


def selected_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select, with the selected providers.

    Raises:
        UserError: a name of a case or provider is unknown.
    """
    found = [case for case in cases(options.sizes) if case.kernel in options.kernels.split(",")]
    _require_known("--cases", options.cases, {case.name for case in found})
    _require_known("--providers", options.providers, {name for case in found for name in case.providers})
    if options.cases:
        found = [case for case in found if case.name in options.cases]
    if options.providers:
        found = [replace(case, providers=_only(options.providers, case.providers)) for case in found]
    return found


def _only(names: list[str], providers: dict[str, Provider]) -> dict[str, Provider]:
    return {name: provider for name, provider in providers.items() if name in names}


def _require_known(option: str, names: list[str] | None, known: set[str]) -> None:
    if unknown := sorted({*(names or [])} - known):
        raise UserError(f"{option} {' '.join(map(repr, unknown))}: there are {', '.join(map(repr, sorted(known)))}")


def _say(result: KernelResult) -> None:
    time_taken = "" if result.milliseconds is None else f"{result.milliseconds:.3f} ms"
    problem = result.problem or ""
    print(f"{result.kernel} {result.case}: {result.provider}: {time_taken} {problem}", file=sys.stderr, flush=True)


def benchmark(options: argparse.Namespace, command: str) -> None:
    """Measure, print and write the results selected by ``options`` of ``command``.

    Raises:
        UserError: a GPU is requested but there is none, or one of our kernels is outside its bounds.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU on this machine; use --device cpu")
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options.device = torch.device(name)
    if options.dtype == "auto":
        options.dtype = "bf16" if name == "cuda" else "fp32"
    dtype_name, options.dtype = options.dtype, DTYPES[options.dtype]
    if options.sizes == "auto":
        options.sizes = "qwen2.5" if name == "cuda" else "small"
    report = BenchmarkReport(command, describe_torch(), {"dtype": dtype_name, "sizes": options.sizes})

    def keep(results: list[KernelResult], left_out: list[str]) -> None:
        report.rows, report.summary = [asdict(result) for result in results], {"left_out": left_out}
        report.write(options.json)

    results, left_out = run(options, keep)
    keep(results, left_out)
    print(format_results(results))
    for case in left_out:
        print(f"not measured, no time left: {case}")
    if options.plot:
        try:
            plot_results(
                results, options.plot, f"{dtype_name}, {report.machine.get('gpu', report.machine['processor'])}"
            )
        except ImportError as error:
            raise UserError(f"--plot {options.plot}: {error}; {install_command('matplotlib')}") from None
    wrong = [f"{result.kernel} {result.case} {result.provider}" for result in results if result.wrong]
    if wrong:
        raise UserError(f"outside the bounds of correctness: {'; '.join(wrong)}")
