"""Join indexed datasets: the shards of one run, or whole datasets, in the order given.

    python tools/merge.py --inputs 'dataset.shard-*-of-8' --output-prefix dataset
    python tools/merge.py --inputs books web/part-* --output-prefix mix

This file is the command line of retemper.tools.preprocessing.merging.merge.
"""

from __future__ import annotations

from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.tools.preprocessing.merging.merge import MergeOptions, format_report, merge


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Join indexed datasets: the shards of one run, or whole datasets, in the order given. Files are "
        "checked against the hashes in their sidecars."
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        required=True,
        metavar="PREFIX|PATTERN",
        help="datasets, each as the path of its .bin and .idx without suffix, or as a quoted pattern of such paths. "
        "Documents keep the order of the arguments; the matches of a pattern are ordered by path, shards of one "
        "run by their numbers. All shards of a run must be given",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PATH", help="path of the dataset to write, without suffix"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing dataset when the new one is complete"
    )
    parser.add_argument(
        "--fill-mask",
        action="store_true",
        help="join datasets with and without a loss mask: in those without, every token is a target",
    )
    parser.mark_usual("--inputs", "--output-prefix", "--overwrite")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> MergeOptions:
    """Parse the command line, by default that of this process."""
    return MergeOptions(**vars(build_parser().parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    print(format_report(merge(parse_arguments(arguments))))


if __name__ == "__main__":
    run_command(main)
