"""Make a Megatron-Core checkpoint out of a Hugging Face folder or a checkpoint.

    python checkpoint_convert/to_megatron.py --hf Qwen/Qwen2-7B --output megatron/ --tensor-parallel 4
    python checkpoint_convert/to_megatron.py --checkpoint runs/x/checkpoints/step-00001000 --output megatron/

The output is for Megatron-LM's ``--load`` with ``--ckpt-format torch_dist``, on any number of ranks. Optimizer states
are left out. Config and tokenizer stand beside it under ``hf/``. Tensors pass through memory in blocks;
``conversion.json`` has the hash of every tensor on both sides. See docs/megatron.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from retemper.checkpoint_convert.megatron_layout import Vocabulary
from retemper.engine.conversion.options import add_copying, add_dtype, add_output, end_like_ctrl_c, parse
from retemper.engine.errors import CommandParser, UserError, run_command

_MAX_MULTIPLE = 2**20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options on the command line, by default that of this process."""
    parser = CommandParser(description="Make a Megatron-Core checkpoint out of a Hugging Face folder or a checkpoint.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR|NAME", help="Hugging Face folder, or Hub name")
    source.add_argument(
        "--checkpoint", metavar="DIR", help="such as runs/x/checkpoints/step-00001000, or a converted one"
    )
    add_output(parser)
    add_dtype(parser, "that of each tensor; what the config declares, for a training checkpoint")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel ranks of the Megatron run, by which it pads the vocabulary (default: %(default)s)",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=Vocabulary.divisible_by,
        metavar="N",
        help="as of Megatron; 1 pads nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--per-layer", action="store_true", help="keys for each layer (non-homogeneous) instead of stacked tensors"
    )
    add_copying(parser)
    options = parse(parser, arguments)
    for option, value in (
        ("--tensor-parallel", options.tensor_parallel),
        ("--make-vocab-size-divisible-by", options.make_vocab_size_divisible_by),
    ):
        if not 0 < value < _MAX_MULTIPLE:
            raise UserError(f"{option} {value}: a positive number below {_MAX_MULTIPLE:,} is needed")
    if options.verify and options.hf is None:
        raise UserError("--verify: needs --hf, transformers reads nothing else")
    return options


def main() -> None:
    end_like_ctrl_c()
    options = parse_arguments()
    from retemper.checkpoint_convert.megatron_export import convert  # needs PyTorch

    convert(**vars(options))


if __name__ == "__main__":
    run_command(main)
