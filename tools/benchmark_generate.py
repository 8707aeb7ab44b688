"""Time the generation of text by batch size and length of the prompt, with a cache and without.

    python tools/benchmark_generate.py --json generate.json --plot generate.png
    python tools/benchmark_generate.py --model hf/ --batch-sizes 1,16 --lengths 512,4096

This file is the command line of retemper.tools.generation.measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from retemper.benchmarks.report import command_line
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, install_command, run_command
from retemper.engine.files.outputs import require_report
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.hugging_face.weight_options import DTYPE_CHOICES

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Time the generation of text: milliseconds for a prompt and for each further token, with the cache "
        "of keys and values, without it, and by transformers.generate, in turn. Prints a Markdown table."
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face folder, or checkpoint folder (default: random weights)"
    )
    parser.add_argument(
        "--hidden-size", type=int, default=256, metavar="N", help="of random weights (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of random weights (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="of random weights (default: %(default)s)"
    )
    parser.add_argument("--batch-sizes", type=_numbers, default="1,8", metavar="LIST", help="default: %(default)s")
    parser.add_argument(
        "--lengths", type=_numbers, default="128,256,512,1024,2048", metavar="LIST", help="default: %(default)s"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="timed tokens after the first (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="measurements, whose median counts (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto", help="default: the model's, else float32")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (.png, .svg, .pdf); needs matplotlib")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0)
    if len(numbers) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers, such as 1,8")
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = build_parser().parse_args(arguments)
    for option in ("hidden_size", "layers", "vocab_size", "new_tokens", "repeats"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(options, option)}: expected at least 1")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            require_report(option, path)
    if options.plot is not None and options.plot.suffix.lower() not in PLOT_SUFFIXES:
        raise UserError(f"--plot {options.plot}: its name must end with one of {', '.join(PLOT_SUFFIXES)}")
    command = command_line("tools/benchmark_generate.py", arguments)
    values = {name: value for name, value in vars(options).items() if name not in ("json", "plot")}
    with without_gc():
        from retemper.tools.generation.measure import MeasureOptions, format_report, measure, plot

    report = measure(MeasureOptions(**values), command)
    print(format_report(report))
    report.write(options.json)
    if options.plot is not None:
        try:
            plot(report, options.plot)
        except ImportError as error:
            raise UserError(f"--plot {options.plot}: {error}; {install_command('matplotlib')}") from None


if __name__ == "__main__":
    run_command(main)
