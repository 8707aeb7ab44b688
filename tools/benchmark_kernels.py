"""Time each kernel beside the peers that are installed, with its error against float64 and its memory.

    python tools/benchmark_kernels.py --sizes small --json kernels.json --plot kernels.png
    python tools/benchmark_kernels.py --sizes issue --kernels linear_cross_entropy,attention

The work is done by retemper.tools.kernel_benchmark; this file is the command line.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from retemper.engine.dtypes import DTYPES
from retemper.engine.errors import CommandParser, UserError, run_command
from retemper.engine.outputs import require_report, write_json_report
from retemper.tools.kernel_benchmark.cases import KERNELS, cases
from retemper.tools.kernel_benchmark.measure import Result, Settings, measure_case
from retemper.tools.kernel_benchmark.report import format_results, plot_results

LIBRARIES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "numpy")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options on the command line, by default that of this process."""
    parser = CommandParser(
        description="Time the forward and backward pass of each kernel and of its peers on random inputs: the median "
        "of several calls, the peak memory, and the error against float64. The error is measured in calls whose "
        "fresh memory held NaN. Fails if one of our kernels is outside its bounds."
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument(
        "--sizes",
        choices=["auto", "tiny", "small", "issue"],
        default="auto",
        help="issue: the sizes of Qwen2.5 0.5B and 7B; auto: these on a GPU, small ones on a CPU (default)",
    )
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU, else fp32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of the timed calls per provider (default: %(default)g)"
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="start no case after this many seconds; cases left out are named"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out providers that use torch.compile")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (.png, .svg, .pdf); needs matplotlib")
    return parser.parse_args(arguments)


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def run(
    options: argparse.Namespace, keep: Callable[[list[Result], list[str]], None] = lambda *_: None
) -> tuple[list[Result], list[str]]:
    """Measure what is asked for; also the names of cases that there was no time for.

    ``keep`` is given both after every case: a run that is ended later has its figures.

    Raises:
        UserError: an unknown kernel, or no GPU where one is asked for.
    """
    kernels = options.kernels.split(",")
    unknown = sorted(set(kernels) - set(KERNELS))
    if unknown:
        raise UserError(f"--kernels {','.join(unknown)}: there are {', '.join(KERNELS)}")
    settings = Settings(options.device, options.dtype, options.seconds)
    torch.manual_seed(options.seed)
    started, results, left_out = time.monotonic(), [], []
    for case in cases(options.sizes):
        if case.kernel not in kernels:
            continue
        if options.time_limit is not None and time.monotonic() - started > options.time_limit:
            left_out.append(f"{case.kernel}: {case.name}")
            continue
        results += measure_case(case, settings, say=_say, compiled=not options.no_compile)
        keep(results, left_out)
    return results, left_out


def _say(result: Result) -> None:
    time_taken = "" if result.milliseconds is None else f"{result.milliseconds:.3f} ms"
    problem = result.problem or ""
    print(f"{result.kernel} {result.case}: {result.provider}: {time_taken} {problem}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            require_report(option, path)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU on this machine; use --device cpu")
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options.device = torch.device(name)
    if options.dtype == "auto":
        options.dtype = "bf16" if name == "cuda" else "fp32"
    dtype_name, options.dtype = options.dtype, DTYPES[options.dtype]
    if options.sizes == "auto":
        options.sizes = "issue" if name == "cuda" else "small"
    facts = machine(options.device)
    command = shlex.join(["python", "tools/benchmark_kernels.py", *(sys.argv[1:] if arguments is None else arguments)])

    def keep(results: list[Result], left_out: list[str]) -> None:
        if options.json:
            record = {"command": command, "machine": facts, "dtype": dtype_name, "left_out": left_out}
            record["results"] = [result.to_dict() for result in results]
            write_json_report("--json", options.json, record)

    results, left_out = run(options, keep)
    keep(results, left_out)
    print(format_results(results))
    for case in left_out:
        print(f"not measured, no time left: {case}")
    if options.plot:
        try:
            plot_results(results, options.plot, f"{dtype_name}, {facts['device']}")
        except ImportError as error:
            raise UserError(f"--plot {options.plot}: {error}; pip install matplotlib") from None
    wrong = [f"{result.kernel} {result.case} {result.provider}" for result in results if result.wrong]
    if wrong:
        raise UserError(f"outside the bounds of correctness: {'; '.join(wrong)}")


if __name__ == "__main__":
    run_command(main)
