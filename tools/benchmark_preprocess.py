"""Measure tools/preprocess.py on a corpus: its share of the bare tokenizer's speed, and its peak memory.

    python tools/benchmark_preprocess.py --input corpus.jsonl --tokenizer models/qwen3 --repeat 6
    python tools/benchmark_preprocess.py --input corpus.jsonl --tokenizer models/qwen3 --megatron --memory-check

This file is the command line of retemper.benchmarks.preprocess. Linux only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from retemper.benchmarks.machine import describe_machine
from retemper.benchmarks.preprocess.benchmark import PreprocessBenchmarkOptions, run_benchmark
from retemper.benchmarks.preprocess.report import format_report, to_report
from retemper.benchmarks.report import command_line
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.files.outputs import Use, require_report


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Measure the preprocess command on a corpus, in one run and on the same cores: the bare tokenizer "
        "on big batches in memory, the whole command with all its processes, and optionally Megatron-LM's loop. "
        "Outputs are compared. Prints Markdown tables."
    )
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="one plain .jsonl file without errors"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR|FILE|NAME", help="tokenizer, as for tools/preprocess.py"
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key of the text (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="workers of both commands (default: the cores of this machine)"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="use the documents N times, if there are too few; tokenizers cache words, so rates are higher than on the "
        "same amount of new text (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="number of rounds; the best one counts (default: %(default)s)"
    )
    parser.add_argument(
        "--megatron", action="store_true", help="also run Megatron-LM's loop, which needs megatron-core"
    )
    parser.add_argument(
        "--megatron-megabytes",
        type=float,
        default=20.0,
        metavar="MB",
        help="size of the part of the corpus for Megatron-LM; its time on the whole corpus is extrapolated (default: "
        "%(default)g)",
    )
    parser.add_argument(
        "--memory-check",
        action="store_true",
        help="run the command on one long synthetic document and on many short ones",
    )
    parser.add_argument(
        "--memory-megabytes",
        type=float,
        nargs=2,
        default=(1000.0, 4000.0),
        metavar=("ONE", "MANY"),
        help="sizes of these two corpora (default: 1000 4000)",
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for corpora and outputs (default: the system's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    return build_parser().parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    settings = vars(parse_arguments(arguments))
    path = settings.pop("json")
    if path is not None:
        require_report("--json", path, [Use("--input", settings["input"])])
    machine = describe_machine()  # before this command puts load on the machine
    options = PreprocessBenchmarkOptions(**settings)
    results = run_benchmark(options)
    print(format_report(results, machine))
    to_report(results, options, command_line("tools/benchmark_preprocess.py", arguments), machine).write(path)


if __name__ == "__main__":
    run_command(main)
