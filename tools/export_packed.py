"""Write packed token sequences as Parquet for other trainers, such as those of transformers and TRL.

    python tools/export_packed.py --config run.yaml --output packed            # the samples of a run, in its order
    python tools/export_packed.py --inputs data/web data/books --sequence-length 4096 --output packed
    python tools/export_packed.py --config run.yaml --output packed --push-to-hub namespace/name

docs/preprocessing.md explains the columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.atomic import require_absent

PUSH = "--push-to-hub"


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Write packed token sequences as Parquet files with the columns input_ids, labels, position_ids "
        "and seq_lengths, for trainers that read Hugging Face datasets."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", metavar="FILE", help="the samples of this run: its mixture, order, sequence length and token budget"
    )
    what.add_argument(
        "--inputs", nargs="+", metavar="PREFIX", help="or these datasets, one after another, each token at most once"
    )
    parser.add_argument("--sequence-length", type=int, metavar="N", help="with --inputs: tokens in a sequence")
    parser.add_argument(
        "--packing",
        choices=("concat", "best_fit"),
        help="with --inputs: cut documents every N tokens (concat, the default), or keep those that fit whole",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--shift-labels",
        action="store_true",
        help="add the column shift_labels: the target of each position, also of the last one",
    )
    parser.add_argument(
        "--tokens-per-file", type=int, default=1 << 26, metavar="N", help="size of the files (default: %(default)s)"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="also upload the folder to this dataset repository (namespace/name) on the Hub; a new repository is "
        "created as a private one; the token comes from HF_TOKEN or `hf auth login`",
    )
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help=f"with {PUSH}: refuse a repository that is public")
    visibility.add_argument("--public", action="store_true", help=f"with {PUSH}: a new repository is public")
    parser.add_argument(
        "--commit-message", metavar="TEXT", help=f"with {PUSH}: message of the commit (default: the folder's name)"
    )
    parser.mark_usual("--config", "--inputs", "--sequence-length", "--output", PUSH)
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process. Raise UserError for options that do not fit."""
    options = build_parser().parse_args(arguments)
    if options.config is not None:
        for name in ("sequence_length", "packing"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: the run of --config has its own; remove one of them")
    elif options.sequence_length is None or options.sequence_length < 2:
        raise UserError(f"--sequence-length {options.sequence_length}: --inputs needs a length of at least 2 tokens")
    if options.tokens_per_file < 1:
        raise UserError(f"--tokens-per-file {options.tokens_per_file}: must be at least 1")
    for name in ("private", "public", "commit_message"):
        if getattr(options, name) and options.push_to_hub is None:
            raise UserError(f"--{name.replace('_', '-')} has no effect without {PUSH}; remove it, or name a repository")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    output = require_absent(options.output)
    from retemper.tools.packed.parquet_files import write_parquet
    from retemper.tools.packed.samples import open_datasets, open_run

    data = (
        open_run(options.config)
        if options.config is not None
        else open_datasets(options.inputs, options.sequence_length, options.packing or "concat")
    )
    if options.push_to_hub is not None:
        _open_repository(options)
    files = write_parquet(data, output, options.tokens_per_file, options.shift_labels)
    tokens = data.num_rows * data.sequence_length
    print(f"wrote {data.num_rows:,} sequences of {data.sequence_length:,} tokens ({tokens:,}) to {output}")
    print(f"files {' '.join(files)}")
    if options.push_to_hub is not None:
        _upload(output, options)


def _open_repository(options: argparse.Namespace) -> None:
    from retemper.engine.weights.hugging_face.upload import open_repository

    place = open_repository(
        options.push_to_hub, PUSH, private=not options.public, only_private=options.private, kind="dataset"
    )
    print(f"will be uploaded to {place}")


def _upload(output: Path, options: argparse.Namespace) -> None:
    from retemper.engine.weights.hugging_face.upload import upload_folder

    done = upload_folder(output, options.push_to_hub, PUSH, message=options.commit_message, kind="dataset")
    print(f"uploaded {done}")


if __name__ == "__main__":
    run_command(main)
