"""Show what an indexed dataset holds: counts, document lengths, decoded documents; or verify it.

python tools/show_dataset.py dataset --documents 3
python tools/show_dataset.py dataset --index 17
python tools/show_dataset.py dataset --verify
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.data.tokenizer import TokenizerHandle, load_tokenizer
from retemper.engine.errors import CommandParser, UserError, run_command
from retemper.tools.ingest.describe import (
    decoded_documents,
    describe_dataset,
    document_lengths,
    length_histogram,
    verify_dataset,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options on the command line, by default that of this process."""
    parser = CommandParser(description="Show what an indexed dataset holds, or verify it.")
    parser.add_argument("dataset", metavar="PREFIX", help="the path of its .bin and .idx without suffix")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--documents", type=int, default=0, metavar="N", help="decode N documents, chosen at random")
    chosen.add_argument("--index", type=int, metavar="I", help="decode document I, counted from 0")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="shown of each document (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", metavar="DIR|NAME", help="to decode with (default: the one that the sidecar names)"
    )
    parser.add_argument("--verify", action="store_true", help="check every index entry and the content hashes")
    return parser.parse_args(arguments)


def choose_tokenizer(name: str | None, sidecar: Sidecar | None, prefix: str) -> TokenizerHandle:
    """The tokenizer ``name``, or that of the sidecar.

    Raises:
        UserError: neither is there, or the sidecar's has changed since.
    """
    if name is not None:
        tokenizer = load_tokenizer(name)
        if sidecar is not None and tokenizer.sha256 != sidecar.tokenizer_sha256:
            print(
                f"{prefix}: made with {sidecar.tokenizer}, whose tokenizer.json differs from this one", file=sys.stderr
            )
        return tokenizer
    if sidecar is None:
        raise UserError(f"{prefix}: no sidecar names its tokenizer; name it with --tokenizer to decode documents")
    tokenizer = load_tokenizer(sidecar.tokenizer)
    if tokenizer.sha256 != sidecar.tokenizer_sha256:
        raise UserError(
            f"{prefix}: made with a tokenizer.json of SHA-256 {sidecar.tokenizer_sha256[:12]}..., but that of "
            f"{tokenizer.name} is now {tokenizer.sha256[:12]}...: name the one it was made with, with --tokenizer"
        )
    return tokenizer


def choose_documents(options: argparse.Namespace, num_documents: int) -> list[int]:
    """The documents to decode, in ascending order."""
    if options.index is not None:
        return [options.index]
    count = min(max(options.documents, 0), num_documents)
    return sorted(random.Random(options.seed).sample(range(num_documents), count))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    dataset = IndexedDataset(options.dataset)
    sidecar = Sidecar.read(dataset.prefix)
    documents: list[str] = []
    if indices := choose_documents(options, dataset.num_documents):
        tokenizer = choose_tokenizer(options.tokenizer, sidecar, dataset.prefix)
        documents = list(decoded_documents(dataset, tokenizer, indices, options.max_tokens))
    if options.verify:
        print(verify_dataset(dataset, sidecar))
    print(describe_dataset(dataset, sidecar))
    print(length_histogram(document_lengths(dataset)))
    for document in documents:
        print(document)


if __name__ == "__main__":
    run_command(main)
