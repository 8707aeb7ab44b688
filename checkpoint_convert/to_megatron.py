"""Convert a Hugging Face folder or a checkpoint to a Megatron-Core checkpoint.

    python checkpoint_convert/to_megatron.py --hf Qwen/Qwen2-7B --output megatron/ --tensor-parallel 4
    python checkpoint_convert/to_megatron.py --checkpoint runs/x/checkpoints/step-00001000 --output megatron/

The output is for Megatron-LM's ``--load`` with ``--ckpt-format torch_dist``, on any number of ranks. Optimizer states
are left out. Config and tokenizer are in its folder ``hf/``. Tensors pass through memory in blocks;
``conversion.json`` has the hash of every tensor on both sides. See docs/megatron.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from retemper.checkpoint_convert.megatron_layout import Vocabulary
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import add_copying, add_dtype, add_output, parse

_MAX_MULTIPLE = 2**20


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Convert a Hugging Face folder or a checkpoint to a Megatron-Core checkpoint.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR|NAME", help="Hugging Face folder, or Hub name")
    source.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="checkpoint folder, such as runs/x/checkpoints/step-00001000, or a converted one",
    )
    add_output(parser)
    add_dtype(parser, "the dtype of each tensor; for a training checkpoint, the dtype in its config")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel size of the Megatron run, which determines the padding of the vocabulary (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=Vocabulary.divisible_by,
        metavar="N",
        help="as in Megatron; 1 adds no padding (default: %(default)s)",
    )
    parser.add_argument(
        "--per-layer",
        action="store_true",
        help="separate keys for each layer (non-homogeneous) instead of stacked tensors",
    )
    add_copying(parser)
    parser.mark_usual("--hf", "--checkpoint", "--output", "--tensor-parallel", "--dtype", "--verify")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    options = parse(build_parser(), arguments)
    for option, value in (
        ("--tensor-parallel", options.tensor_parallel),
        ("--make-vocab-size-divisible-by", options.make_vocab_size_divisible_by),
    ):
        if not 0 < value < _MAX_MULTIPLE:
            raise UserError(f"{option} {value}: a positive number below {_MAX_MULTIPLE:,} is needed")
    if options.verify and options.hf is None:
        raise UserError("--verify: needs --hf, the only input that transformers reads")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    with without_gc():
        from retemper.checkpoint_convert.megatron_export import convert

    convert(**vars(options))


if __name__ == "__main__":
    run_command(main)
