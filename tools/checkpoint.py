"""Show, verify, compare, average, prune and upgrade checkpoints.

    python tools/checkpoint.py ls runs/x                       # every checkpoint: step, loss, size, why it is kept
    python tools/checkpoint.py verify runs/x/checkpoints/*     # read every byte; exit status 1 if one is damaged
    python tools/checkpoint.py diff A B                        # settings and tensors that differ; exit status 1 then
    python tools/checkpoint.py merge A B C --output averaged   # average the weights of checkpoints, or of model folders
    python tools/checkpoint.py prune runs/x --keep-last 2 --keep-every 10000 --dry-run
    python tools/checkpoint.py upgrade runs/x                  # rewrite those of former formats in the present one

This file is the command line of retemper.tools.checkpoint_report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.files.atomic import require_absent
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import add_shard_size
from retemper.tools.checkpoint_report.listing import format_listing, list_checkpoints
from retemper.tools.checkpoint_report.verification import verify


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Show, verify, compare, average, prune and upgrade checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|diff|merge|prune|upgrade")
    ls = commands.add_parser("ls", help="list the checkpoints of a run; sizes are checked, contents are not read")
    ls.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    verify_ = commands.add_parser("verify", help="compare every byte with the hashes; exit status 1 on damage")
    verify_.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="checkpoint or run folder")
    diff = commands.add_parser(
        "diff", help="show the differences between two checkpoints; exit status 1 if there are any"
    )
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    _add_merge(commands.add_parser("merge", help="average the weights of checkpoints, or of Hugging Face folders"))
    thin = commands.add_parser("prune", help="remove checkpoints; the best one and damaged ones are kept")
    thin.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    thin.add_argument(
        "--keep-last", type=_positive, required=True, metavar="N", help="number of newest checkpoints to keep"
    )
    thin.add_argument(
        "--keep-every",
        type=_positive,
        default=0,
        metavar="N",
        help="also keep checkpoints whose step is a multiple of this",
    )
    thin.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    renew = commands.add_parser("upgrade", help="rewrite checkpoints of older formats in the current format")
    renew.add_argument("path", type=Path, metavar="PATH", help="checkpoint or run folder")
    return parser


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument(
        "folders", type=Path, nargs="+", metavar="PATH", help="checkpoints or Hugging Face folders of one model"
    )
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    merge.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="WEIGHT",
        help="weight of each folder; they are divided by their sum (default: all are equal)",
    )
    add_shard_size(merge)
    merge.add_argument(
        "--workers", type=int, metavar="N", help="number of threads that average (default: one for each CPU, up to 8)"
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    return build_parser().parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    if options.command == "ls":
        print(format_listing(list_checkpoints(options.run_folder)))
        return 0
    if options.command == "verify":
        return 0 if verify(options.paths) else 1
    if options.command == "diff":
        with without_gc():
            from retemper.tools.checkpoint_report.comparison import compare

        return 1 if compare(options.first, options.second) else 0
    if options.command == "merge":
        require_absent(options.output)
        with without_gc():
            from retemper.engine.weights.conversion.merge import merge

        merge(options.folders, options.output, options.weights, options.max_shard_size, options.workers)
        return 0
    if options.command == "upgrade":
        with without_gc():
            from retemper.tools.checkpoint_report.upgrading import upgrade

        upgrade(options.path)
        return 0
    with without_gc():
        from retemper.tools.checkpoint_report.pruning import prune

    prune(options.run_folder, options.keep_last, options.keep_every, options.dry_run)
    return 0


if __name__ == "__main__":
    run_command(main)
