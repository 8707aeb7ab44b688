"""Convert a Hugging Face folder to a checkpoint for training.

    python checkpoint_convert/hf_to_dcp.py --hf Qwen/Qwen2-72B --output ckpt/base
    python checkpoint_convert/hf_to_dcp.py --hf models/llama --output ckpt/llama --dtype bfloat16 --verify

The checkpoint keeps every bit and every dtype unless ``--dtype`` is given, and contains config and tokenizer.
Tensors pass through memory in blocks. ``conversion.json`` in the output has the hash of every tensor on both sides.
After an interruption the same command continues from the files that it had finished. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import (
    add_copying,
    add_dtype,
    add_output,
    add_trust,
    parse,
)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Convert a Hugging Face folder to a checkpoint for training.")
    parser.add_argument("--hf", required=True, metavar="DIR|NAME", help="Hugging Face folder, or Hub name")
    add_output(parser)
    add_dtype(parser, "the dtype of each tensor in the folder")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="number of rows of embedding and head: surplus rows are cut off, new ones are the mean of the old ones "
        "(default: unchanged)",
    )
    vocabulary.add_argument(
        "--pad-vocab-to-multiple-of", type=int, metavar="N", help="add rows up to the next multiple of N"
    )
    add_copying(parser)
    add_trust(parser)
    parser.mark_usual("--hf", "--output", "--dtype", "--verify")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    return parse(build_parser(), arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    with without_gc():
        from retemper.engine.weights.conversion.hf_to_dcp import convert

    convert(**vars(options))


if __name__ == "__main__":
    run_command(main)
