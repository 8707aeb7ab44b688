"""Time each kernel and its installed peers, with errors against float64 and memory.

    python tools/benchmark_kernels.py --sizes small --json kernels.json --plot kernels.png
    python tools/benchmark_kernels.py --sizes qwen2.5 --kernels linear_cross_entropy,attention

This file is the command line of retemper.benchmarks.kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.benchmarks.kernel.names import KERNELS
from retemper.benchmarks.report import command_line
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import require_report
from retemper.engine.guards.garbage_collection import without_gc


def _current_name(sizes: str) -> str:
    """Accept the name that ``qwen2.5`` had in 0.1."""
    if sizes == "issue":
        print("--sizes issue: is called --sizes qwen2.5 now; the old name will be refused later", file=sys.stderr)
        return "qwen2.5"
    return sizes


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Time the forward and backward pass of each kernel and of its peers on random inputs: the median "
        "of several calls, the peak memory, and the error against float64. The error is measured in calls whose "
        "fresh memory held NaN. Fails if one of our kernels is outside its bounds."
    )
    parser.add_argument("--kernels", default=",".join(KERNELS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="names of cases, as in the tables (default: all)")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="names of providers, as in the tables (default: all)"
    )
    parser.add_argument(
        "--sizes",
        type=_current_name,
        choices=["auto", "tiny", "small", "qwen2.5"],
        default="auto",
        help="qwen2.5: the sizes of Qwen2.5 0.5B and 7B; auto: these on a GPU, small ones on a CPU (default)",
    )
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU, else fp32"
    )
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
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    return build_parser().parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            require_report(option, path)
    unknown = sorted({*options.kernels.split(",")} - {*KERNELS})
    if unknown:
        raise UserError(f"--kernels {','.join(unknown)}: there are {', '.join(KERNELS)}")
    command = command_line("tools/benchmark_kernels.py", arguments)
    with without_gc():
        from retemper.benchmarks.kernel.command import benchmark

    benchmark(options, command)


if __name__ == "__main__":
    run_command(main)
