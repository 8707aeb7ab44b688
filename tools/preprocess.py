"""Tokenize text to an indexed dataset for training.

    python tools/preprocess.py --input corpus.jsonl                # -> dataset.bin, dataset.idx, dataset.json
    python tools/preprocess.py --input books/ 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/mix

The work is done by retemper.tools.ingest; this file is the command line.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence

from retemper.engine.errors import CommandParser, run_command
from retemper.tools.ingest.pipeline import PreprocessOptions, format_report, preprocess

DEFAULT_TOKENIZER = "Qwen/Qwen2-72B"


def parse_arguments(arguments: Sequence[str] | None = None) -> PreprocessOptions:
    """The options on the command line, by default that of this process."""
    parser = CommandParser(
        description="Tokenize text to an indexed dataset: Megatron-LM's .bin and .idx, and a .json that describes them."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE|DIR|GLOB",
        help=".jsonl, .jsonl.gz, .jsonl.zst (one JSON object a line) or .txt (one document a file); a folder stands "
        "for all such files in it. Documents keep the order of the arguments; within a folder or pattern, of the paths",
    )
    parser.add_argument(
        "--tokenizer",
        default=DEFAULT_TOKENIZER,
        metavar="DIR|NAME",
        help="folder with tokenizer.json, or Hugging Face Hub name (default: %(default)s, the Qwen2 family's)",
    )
    parser.add_argument("--output-prefix", default="dataset", metavar="PATH", help="default: %(default)s")
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="key of the text in JSONL (default: %(default)s)"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="the end-of-document token (default: <|endoftext|> where the tokenizer has it, else its EOS)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores of this machine)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing dataset once the new one is complete"
    )
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="count malformed lines and leave them out, rather than stop at the first",
    )
    return PreprocessOptions(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    print(format_report(preprocess(parse_arguments(arguments))))


if __name__ == "__main__":
    # A scheduler's SIGTERM cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(main)
