"""Add tokens for a domain to a model.

    python tools/extend_vocab.py --model ckpt/base --corpus corpus.jsonl --num-tokens 2000 --output ckpt/extended
    python tools/extend_vocab.py --model models/llama --tokens words.txt --output models/llama-extended

Existing ids do not change. This file is the command line of retemper.tools.vocabulary; see docs/vocabulary.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.weights.hugging_face.weight_options import DEFAULT_MAX_SHARD_SIZE
from retemper.tools.vocabulary.options import ExtendOptions


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Learn new tokens from a corpus, or read them from a list, and write the model with rows for them."
    )
    _add_model(parser.add_argument_group("model"))
    _add_corpus(parser.add_argument_group("corpus"))
    _add_tokens(parser.add_argument_group("new tokens"))
    parser.mark_usual("--model", "--output", "--corpus", "--num-tokens", "--tokens")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> ExtendOptions:
    """Parse the command line, by default that of this process."""
    return ExtendOptions(**vars(build_parser().parse_args(arguments)))


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", required=True, metavar="DIR|NAME", help="Hugging Face folder or name, or checkpoint")
    group.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write, of the same kind as --model; must not exist"
    )
    group.add_argument(
        "--pad-vocab-to-multiple-of",
        type=int,
        metavar="N",
        help="round the rows of the new embedding up to a multiple of N (default: the largest power of two up to 128 "
        "that divides the old number)",
    )
    group.add_argument(
        "--max-shard-size",
        default=DEFAULT_MAX_SHARD_SIZE,
        metavar="SIZE",
        help="maximum size of a safetensors file in a Hugging Face folder (default: %(default)s)",
    )


def _add_corpus(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        metavar="FILE|DIR|GLOB",
        help="text of the domain, in any format that tools/preprocess.py reads. A tenth of its documents is held out "
        "to measure the gain",
    )
    group.add_argument(
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="key of the text in a record, as in tools/preprocess.py",
    )
    group.add_argument(
        "--txt-mode",
        choices=("file", "line"),
        default="file",
        help="unit of a document in .txt: the whole file (default), or a line",
    )
    group.add_argument("--max-documents", type=int, metavar="N", help="read at most this many documents of the corpus")
    group.add_argument("--max-bytes", type=int, metavar="N", help="read about this many bytes of text at most")


def _add_tokens(group: argparse._ArgumentGroup) -> None:
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--num-tokens", type=int, default=2000, metavar="N", help="number of tokens to learn (default: %(default)s)"
    )
    what.add_argument(
        "--tokens",
        metavar="FILE",
        help="add these tokens instead: one per line with its leading space, JSON lines, or a vocabulary.json of this "
        "tool",
    )
    group.add_argument(
        "--min-count",
        type=int,
        default=10,
        metavar="N",
        help="minimum number of occurrences in the corpus for a learned token (default: %(default)s)",
    )
    group.add_argument(
        "--max-characters",
        type=int,
        default=16,
        metavar="N",
        help="maximum length of a learned token, with the space before it (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    with without_gc():
        from retemper.tools.vocabulary.command import extend

    extend(options)


if __name__ == "__main__":
    run_command(main)
