"""Check this machine, or all machines of a launcher, before a run: what is missing, and what fixes it.

    python tools/doctor.py                                      # software, GPUs, disks, memory, limits
    python tools/doctor.py --network                            # and whether the Hugging Face Hub can be reached
    python tools/doctor.py --tokenizer Qwen/Qwen2.5-0.5B        # and whether a tokenizer is exact
    python tools/doctor.py --config run.yaml                    # and what this run needs
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/doctor.py  # all machines, and whether their ranks reach each other

The exit status is 1 if there is a problem. The checks are in retemper.tools.diagnosis; this file is the command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.parallel.launcher import Launcher, read_launcher
from retemper.tools.diagnosis.finding import Finding, checked, format_findings, problem
from retemper.tools.ssh_launch.hostfile import read_hosts


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Check this machine before a run: what is missing, and what fixes it. Under torchrun it checks all "
        "machines, and whether their ranks reach each other. The exit status is 1 if there is a problem.",
        epilog="With --config, all other options are those of engine/pretrain.py, such as --parallel.tensor 8.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE|URL", help="check what this run needs")
    parser.add_argument(
        "--tokenizer", metavar="DIR|FILE|NAME", help="check that this tokenizer is exact, in training and when served"
    )
    parser.add_argument("--network", action="store_true", help="check that the Hugging Face Hub can be reached")
    parser.add_argument(
        "--hosts",
        metavar="HOSTS",
        help="check that these machines can be reached: HOST[:PORT] separated by commas, or a hostfile (port: 22)",
    )
    parser.add_argument(
        "--run-folder", type=Path, default=Path("runs"), metavar="DIR", help="where runs write (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=int, default=60, metavar="SECONDS", help="wait for ranks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of this process. Return 1 if there is a problem."""
    options, settings = build_parser().parse_known_args(arguments)
    if options.timeout < 1:
        raise UserError(f"--timeout {options.timeout}: must be at least 1 second")
    if settings and not options.config:
        raise UserError(f"unexpected argument '{settings[0]}'; settings of a run need --config FILE; see --help")
    refused: list[Finding] = []
    try:
        launcher = read_launcher()
    except UserError as error:  # such as tasks of srun without torchrun
        launcher, refused = Launcher(), [problem("Launcher", "variables", str(error), "")]
    findings = [*refused, *_of_this_machine(options, settings, launcher)] if launcher.local_rank == 0 else []
    if launcher.world_size > 1:
        findings = _of_all_ranks(options, findings)
    if launcher.rank > 0:
        return 0
    _print(findings, options.json)
    return int(any(finding.status == "problem" for finding in findings))


def _of_this_machine(options: argparse.Namespace, settings: list[str], launcher: Launcher) -> list[Finding]:
    with without_gc():
        from retemper.tools.diagnosis import configuration, gpus, hub, machine, ranks, software, tokenizer_exactness

    findings = [
        *software.check_software(),
        *gpus.check_gpus(),
        *machine.check_machine(options.run_folder),
        *hub.check_hub(options.network),
    ]
    if options.tokenizer is not None:
        group = tokenizer_exactness.GROUP
        findings += checked(group, "file", lambda: tokenizer_exactness.check_tokenizer(options.tokenizer))
    if options.config:
        run = [word for file in options.config for word in ("--config", file)] + settings
        check = lambda: configuration.check_configuration(run, launcher, options.network)  # noqa: E731
        findings += checked(configuration.GROUP, "settings", check)
    if options.hosts is not None and launcher.rank == 0:
        findings += ranks.check_hosts(read_hosts(options.hosts))
    return findings


def _of_all_ranks(options: argparse.Namespace, findings: list[Finding]) -> list[Finding]:
    from retemper.tools.diagnosis.ranks import check_ranks, expected_hosts

    expected = expected_hosts(read_hosts(options.hosts) if options.hosts is not None else [])
    return [*findings, *check_ranks(findings, expected, options.timeout)]


def _print(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        print(format_findings(findings))


if __name__ == "__main__":
    run_command(main)
