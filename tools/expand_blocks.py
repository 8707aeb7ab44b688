"""Add blocks to a model that do not change what it computes, to train them alone on another corpus.

    python tools/expand_blocks.py --model Qwen/Qwen2.5-0.5B --num-blocks 4 --output models/expanded

This file is the command line of retemper.engine.weights.conversion.expand_blocks; see docs/training_methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import add_shard_size


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Copy blocks of a model, with output projections of zero, so that it computes the same as before."
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="Hugging Face folder or name")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument(
        "--num-blocks",
        type=int,
        required=True,
        metavar="N",
        help="number of new blocks, a divisor of the number of blocks: the blocks are divided into N groups, and the "
        "last one of each group is copied",
    )
    add_shard_size(parser)
    parser.add_argument(
        "--workers", type=int, metavar="N", help="number of threads that copy (default: one for each CPU, up to 8)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = build_parser().parse_args(arguments)
    with without_gc():
        from retemper.engine.weights.conversion.expand_blocks import expand_blocks

    expand_blocks(options.model, options.output, options.num_blocks, options.max_shard_size, options.workers)


if __name__ == "__main__":
    run_command(main)
