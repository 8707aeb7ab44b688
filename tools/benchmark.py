"""Time the training step: tokens/s, MFU, time of each part, peak memory.

    python tools/benchmark.py --config megatron_configs/qwen2.5_0.5b.yaml --json step.json
    torchrun --nproc-per-node 8 tools/benchmark.py --config megatron_configs/qwen2.5_7b.yaml --steps 30
    python tools/benchmark.py --config run.yaml --sweep micro_batch_size=1,2,4 recompute=none,full

This file is the command line of retemper.benchmarks.step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.benchmarks.machine import describe_machine, describe_torch
from retemper.benchmarks.report import BenchmarkReport, command_line
from retemper.benchmarks.step.options import StepBenchmarkOptions
from retemper.benchmarks.step.sweep import format_sweep, parse_sweep, run_sweep
from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.parser import build_parser as build_settings_parser
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig, to_dict
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use, require_report
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.parallel.launcher import read_launcher
from retemper.engine.parallel.layout import check_layout


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Time the steps of a training run on random weights: tokens/s, MFU, time of "
        "each part, peak memory. No checkpoint is read or written, and no run folder is touched. Prints Markdown "
        "tables.",
        epilog="All other options are those of engine/pretrain.py, such as --training.micro_batch_size 2.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE|URL", help="configuration, as for engine/pretrain.py"
    )
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="number of timed steps (default: %(default)s)"
    )
    parser.add_argument(
        "--warmup-steps",
        type=int,
        default=5,
        metavar="N",
        help="number of untimed steps before them (default: %(default)s)",
    )
    parser.add_argument(
        "--real-data", action="store_true", help="read the datasets of the configuration (default: random tokens)"
    )
    parser.add_argument(
        "--documents",
        default="whole",
        metavar="LENGTHS",
        help="lengths of the random documents, in tokens: fixed:N, uniform:LEAST:MOST, lognormal:MEAN[:SIGMA], or "
        "whole: every sample is one document (default: %(default)s)",
    )
    parser.add_argument(
        "--matmul-seconds",
        type=float,
        default=0.2,
        metavar="S",
        help="seconds for each size and dtype of the matrix products that measure the peak; 0 skips them (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=V1,V2",
        help="measure all combinations of these settings, each in a fresh process, and name the fastest that fits",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="COMMAND",
        help="with --sweep: command that starts each process, such as 'torchrun --nproc-per-node 8' (default: python)",
    )
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="profile three further steps on the main rank: operators.txt, a table by device time, and trace.json.gz "
        "for ui.perfetto.dev",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.mark_usual("--config", "--steps", "--real-data", "--sweep", "--profile", "--json")
    parser.take_settings(build_settings_parser)
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command, and return the others, which belong to the run's configuration."""
    options, rest = build_parser().parse_known_args(arguments)
    return options, [word for file in options.config for word in ("--config", file)] + rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, run_arguments = parse_arguments(arguments)
    config = parse_config(run_arguments)
    settings = StepBenchmarkOptions(
        options.steps,
        options.warmup_steps,
        options.real_data,
        options.documents,
        options.matmul_seconds,
        options.profile,
    )
    settings.check()
    if options.json is not None:
        require_report("--json", options.json, [Use("--config", path) for path in options.config])
    command = command_line("tools/benchmark.py", arguments)
    if options.sweep:
        _sweep(config, options, settings, run_arguments, command)
    elif options.launch:
        raise UserError(f"--launch {options.launch}: is only for --sweep; otherwise start this command with it")
    else:
        _measure(config, options.json, settings, command)


def _measure(config: RunConfig, path: Path | None, settings: StepBenchmarkOptions, command: str) -> None:
    # Everything that needs PyTorch is imported before any rank waits for another.
    with without_gc():
        from retemper.benchmarks.step.measure import measure_step
        from retemper.benchmarks.step.report import format_report, to_report
        from retemper.engine.parallel.process_group import process_group

    with process_group(config.device, config.parallel.timeout_seconds) as ranks:
        ranks.fail_together(lambda: check_layout(config, ranks.world_size))
        machine = describe_torch()  # before this command puts load on the machine
        found = measure_step(config, settings, ranks)
        if ranks.is_main:
            print(format_report(found, machine))
        ranks.run_on_rank0(lambda: to_report(found, config, settings, command, machine).write(path))


def _sweep(
    config: RunConfig,
    options: argparse.Namespace,
    settings: StepBenchmarkOptions,
    run_arguments: list[str],
    command: str,
) -> None:
    if read_launcher().launched:
        raise UserError("--sweep: starts processes itself; leave out torchrun and name it with --launch 'torchrun ...'")
    if settings.profile is not None:
        raise UserError(f"--profile {settings.profile}: is for one measurement; remove it, or --sweep")
    combinations = parse_sweep(options.sweep, config)
    report = BenchmarkReport(command, describe_machine(), {"config": to_dict(config), "sweep": options.sweep})
    program = [*(shlex.split(options.launch) or [sys.executable]), str(Path(__file__).resolve()), *run_arguments]
    program += ["--steps", str(settings.steps), "--warmup-steps", str(settings.warmup_steps)]
    program += ["--documents", settings.documents, "--matmul-seconds", str(settings.matmul_seconds)]
    program += ["--real-data"] if settings.real_data else []
    rows = run_sweep(combinations, program, lambda line: print(line, file=sys.stderr, flush=True))
    print(format_sweep(rows))
    report.rows = [{"sweep": row.settings, "outcome": row.outcome, **(row.record or {})} for row in rows]
    report.write(options.json)
    if not any(row.record for row in rows):
        raise UserError(f"--sweep {' '.join(options.sweep)}: no setting succeeded; the table shows why")


if __name__ == "__main__":
    run_command(main)
