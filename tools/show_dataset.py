"""Show the contents of an indexed dataset or one of its documents, or verify its files.

    python tools/show_dataset.py dataset                                  # totals, lengths, tokens, copies, documents
    python tools/show_dataset.py dataset --config run.yaml --html dataset.html   # and how a run uses it; as a page
    python tools/show_dataset.py dataset --quick                          # estimate from samples of a large dataset
    python tools/show_dataset.py dataset --index 17
    python tools/show_dataset.py dataset --verify

The work is done by retemper.tools.reports.dataset; this file is the command line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use, require_report
from retemper.tools.preprocessing.dataset_files import existing_outputs
from retemper.tools.reports.dataset.decoding import decode_document
from retemper.tools.reports.dataset.page import write_page
from retemper.tools.reports.dataset.report import InspectOptions, inspect_dataset
from retemper.tools.reports.dataset.text import format_document, format_report
from retemper.tools.reports.dataset.tokenizers import choose_tokenizer, find_eod_id
from retemper.tools.reports.dataset.verification import verify_dataset
from retemper.tools.tokenizer.handle import load_tokenizer


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    defaults = InspectOptions("")
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", metavar="PREFIX", help="path of its .bin and .idx files without the suffix")
    parser.add_argument(
        "--tokenizer", metavar="DIR|FILE|NAME", help="tokenizer to decode with (default: that of the sidecar)"
    )
    parser.add_argument(
        "--max-tokens",
        type=_count,
        metavar="N",
        help=f"tokens shown of each document ({defaults.max_tokens})",
    )
    report = parser.add_argument_group("the report")
    report.add_argument("--quick", action="store_true", help="estimate from samples instead of reading all tokens")
    report.add_argument(
        "--config", metavar="FILE|URL", help="YAML file of a run: show its steps, epochs and cut documents"
    )
    report.add_argument("--documents", type=_count, metavar="N", help="decode N random documents (default: 3)")
    report.add_argument("--seed", type=_count, metavar="N", help="seed of all random choices (default: 0)")
    report.add_argument("--html", type=Path, metavar="FILE", help="also write a self-contained page with plots")
    report.add_argument("--json", action="store_true", help="print JSON instead of text")
    other = parser.add_argument_group("instead of the report").add_mutually_exclusive_group()
    other.add_argument("--index", type=_count, metavar="I", help="decode document I, counted from 0")
    other.add_argument("--verify", action="store_true", help="check every index entry, token id and hash")
    parser.mark_usual("--tokenizer", "--quick", "--config", "--documents", "--html", "--index", "--verify")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process.

    Raises:
        UserError: an option has no effect with another one.
    """
    options = build_parser().parse_args(arguments)
    _refuse_combinations(options)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    if options.verify:
        dataset = IndexedDataset(options.dataset, check_whole=True)
        tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
        _print(verify_dataset(dataset, Sidecar.read(dataset.prefix), tokenizer))
    elif options.index is not None:
        _print(_one_document(options))
    else:
        _report(options)


def _report(options: argparse.Namespace) -> None:
    if options.html is not None:
        reads = [Use("dataset", path) for path in existing_outputs(options.dataset)]
        reads += [] if options.config is None else [Use("--config", options.config)]
        require_report("--html", options.html, reads)
    names = ("tokenizer", "documents", "seed", "max_tokens", "config")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    report = inspect_dataset(InspectOptions(options.dataset, quick=options.quick, **given))
    if options.html is not None:
        write_page(options.html, report)
    _print(json.dumps(report.to_dict(), indent=2) if options.json else format_report(report))


def _one_document(options: argparse.Namespace) -> str:
    dataset = IndexedDataset(options.dataset, check_whole=True)
    sidecar = Sidecar.read(dataset.prefix)
    tokenizer = choose_tokenizer(options.tokenizer, sidecar, dataset.prefix)
    max_tokens = options.max_tokens if options.max_tokens is not None else InspectOptions("").max_tokens
    decoded = decode_document(dataset, tokenizer, options.index, max_tokens, find_eod_id(tokenizer, sidecar))
    if decoded.problem:
        raise UserError(f"{dataset.prefix}: {decoded.problem}")
    return format_document(decoded, dataset.has_loss_mask)


def _refuse_combinations(options: argparse.Namespace) -> None:
    mode = "--verify" if options.verify else "--index" if options.index is not None else None
    if mode is None:
        return
    useless = ["quick", "config", "documents", "seed", "html", "json"]
    useless += ["max_tokens"] if options.verify else []
    if given := [name for name in useless if not (getattr(options, name) is None or getattr(options, name) is False)]:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect with {mode}; remove one of them")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def _print(text: str) -> None:
    # A path may contain bytes that are not valid text.
    print(text.encode("utf-8", "backslashreplace").decode())


if __name__ == "__main__":
    run_command(main)
