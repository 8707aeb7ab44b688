"""Make a mixture of experts of a dense model, which computes the same before it is trained (sparse upcycling).

    python tools/upcycle.py --model Qwen/Qwen3-0.6B-Base --num-experts 8 --output models/mixture

This file is the command line of retemper.engine.weights.conversion.upcycle; see docs/training_methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import add_shard_size


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Write a dense model as a mixture of experts that are copies of its layers.")
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="Hugging Face folder or name")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--num-experts", type=int, required=True, metavar="N", help="number of experts in each block")
    parser.add_argument(
        "--experts-per-token", type=int, default=2, metavar="N", help="number of experts of each token (default: 2)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random routers (default: 0)")
    add_shard_size(parser)
    parser.add_argument(
        "--workers", type=int, metavar="N", help="number of threads that copy (default: one for each CPU, up to 8)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = build_parser().parse_args(arguments)
    with without_gc():
        from retemper.engine.weights.conversion.upcycle import upcycle

    upcycle(
        options.model,
        options.output,
        options.num_experts,
        options.experts_per_token,
        options.seed,
        options.max_shard_size,
        options.workers,
    )


if __name__ == "__main__":
    run_command(main)
