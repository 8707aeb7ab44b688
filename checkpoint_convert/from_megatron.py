"""Convert a Megatron-Core checkpoint to a Hugging Face folder, or to a checkpoint for training.

    python checkpoint_convert/from_megatron.py --megatron megatron/ --config Qwen2-7B/ --output hf/
    python checkpoint_convert/from_megatron.py --megatron megatron/iter_0001000 --output ckpt/base --format checkpoint

Megatron need not be installed. ``--config`` is the model's Hugging Face config.json, or a folder that also has its
tokenizer; without it, the settings that Megatron stores are used. Optimizer states are left out. Tensors pass through
memory in blocks; ``conversion.json`` in the output has the hash of every tensor on both sides. See docs/megatron.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import (
    HF,
    TARGET_FORMATS,
    add_copying,
    add_dtype,
    add_output,
    add_shard_size,
    parse,
)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Convert a Megatron-Core checkpoint to a Hugging Face folder or a checkpoint.")
    parser.add_argument(
        "--megatron",
        required=True,
        metavar="DIR",
        help="checkpoint in the format torch_dist: its folder (iter_..., release), or the folder above it",
    )
    add_output(parser)
    parser.add_argument(
        "--format",
        choices=TARGET_FORMATS,
        default=HF,
        help="write a Hugging Face folder, or a checkpoint for the trainer (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="the model's Hugging Face config.json, or the folder that holds it and the tokenizer (default: derived "
        "from the settings in the checkpoint)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with the tokenizer (default: the one of --config)")
    add_dtype(parser, "the dtype of each tensor")
    add_shard_size(parser)
    add_copying(parser)
    parser.mark_usual("--megatron", "--output", "--format", "--config", "--dtype", "--verify")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    options = parse(build_parser(), arguments)
    if options.verify and options.format != HF:
        raise UserError(f"--verify: needs --format {HF}, the only one that transformers reads")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    with without_gc():
        from retemper.checkpoint_convert.megatron_import import convert

    convert(**vars(options))


if __name__ == "__main__":
    run_command(main)
