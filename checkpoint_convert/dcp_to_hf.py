"""Convert a checkpoint to a Hugging Face folder.

    python checkpoint_convert/dcp_to_hf.py --checkpoint runs/x/checkpoints/step-00001000 --output hf/

A training checkpoint holds fp32 master weights; they are written in the dtype of the model's config. A converted
checkpoint gives the original tensors, bit for bit. ``--dtype`` overrides both. Optimizer
states are left out. Tensors pass through memory in blocks. ``conversion.json`` in the output has the hash of every
tensor on both sides. After an interruption the same command continues from the files that it had finished. See
docs/conversion.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use, require_separate
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.conversion.options import (
    add_copying,
    add_dtype,
    add_output,
    add_shard_size,
    add_trust,
    parse,
)

PUSH = "--push-to-hub"
BASE_OPTION, ADAPTER = "--base", "--adapter"
_OF_MERGED = ("max_shard_size", "vocab_size", "carried_from", "verify")
"""Options without effect on a folder for PEFT."""


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Convert a checkpoint to a Hugging Face folder.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="checkpoint folder, such as runs/x/checkpoints/step-00001000, or a converted one",
    )
    add_output(parser)
    add_dtype(parser, "for a training checkpoint, the dtype in the model's config; for a converted one, unchanged")
    add_shard_size(parser)
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="number of rows of embedding and head, such as that before padding (default: unchanged)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="export the moving average of the weights that training.ema_decay keeps, instead of the weights",
    )
    parser.add_argument(
        "--carried-from",
        metavar="DIR",
        help="folder of the original Hugging Face model, if it has been moved: exports take the tensors that are not "
        "trained from there, such as those of a vision tower",
    )
    parser.add_argument(
        BASE_OPTION,
        metavar="DIR",
        help="for a checkpoint with an adapter: folder of the base model, if it has been moved since the training",
    )
    parser.add_argument(
        ADAPTER,
        action="store_true",
        help="for a checkpoint with an adapter: write a folder for PEFT with the adapter alone, instead of the merged "
        "model",
    )
    add_copying(parser)
    add_trust(parser)
    parser.add_argument(
        PUSH,
        metavar="NAME",
        help="also upload the output, without conversion.json, to this model repository (namespace/name) on the Hub; a "
        "new repository is created as a private one; the token comes from HF_TOKEN or `hf auth login`",
    )
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private",
        action="store_true",
        help=f"with {PUSH}: refuse a repository that is public; its visibility is never changed",
    )
    visibility.add_argument("--public", action="store_true", help=f"with {PUSH}: a new repository is public")
    parser.add_argument(
        "--commit-message", metavar="TEXT", help=f"with {PUSH}: message of the commit (default: the folder's name)"
    )
    parser.mark_usual("--checkpoint", "--output", "--dtype", "--verify", "--push-to-hub")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    options = parse(build_parser(), arguments)
    given = [name for name in _OF_MERGED if getattr(options, name) != build_parser().get_default(name)]
    if options.adapter and given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect with {ADAPTER}; remove one of them")
    for name in ("private", "public", "commit_message"):
        if getattr(options, name) and options.push_to_hub is None:
            raise UserError(f"--{name.replace('_', '-')} has no effect without {PUSH}; remove it, or name a repository")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = vars(parse_arguments(arguments))
    repository = options.pop("push_to_hub")
    upload = {name: options.pop(name) for name in ("private", "public", "commit_message")}
    if repository is not None:
        _convert_and_upload(options, repository, **upload)
        return
    with without_gc():
        from retemper.engine.weights.conversion.dcp_to_hf import convert

    convert(**options)


def _convert_and_upload(
    options: dict[str, Any], repository: str, private: bool, public: bool, commit_message: str | None
) -> None:
    with without_gc():
        from retemper.engine.weights.conversion.dcp_to_hf import convert, plan_export
        from retemper.engine.weights.conversion.provenance import CONVERSION_FILE
        from retemper.engine.weights.hugging_face.upload import open_repository, upload_folder

    checkpoint, output = Path(options["checkpoint"]), Path(options["output"])
    # What convert would refuse before it reads any weights is refused before a repository is made.
    require_separate([Use("--checkpoint", checkpoint)], folders=[Use(f"--output {output}", output)])
    planned = ("dtype", "max_shard_size", "vocab_size", "carried_from", "ema", "base", "adapter")
    plan_export(checkpoint, **{key: options[key] for key in planned})
    place = open_repository(repository, PUSH, private=not public, only_private=private)
    print(f"will be uploaded to {place}")
    convert(**options)
    print(f"uploaded {upload_folder(output, repository, PUSH, [CONVERSION_FILE], commit_message)}")


if __name__ == "__main__":
    run_command(main)
