"""Tokenize text to an indexed dataset for training.

    python tools/preprocess.py --input corpus.jsonl                # -> dataset.bin, dataset.idx, dataset.json
    python tools/preprocess.py --input books/ 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/mix
    python tools/preprocess.py --input web.parquet --dedup exact --split train=0.98,valid=0.02 --shuffle

This file is the command line of retemper.tools.preprocessing. The guide is docs/preprocessing.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

# numpy reads this when it is imported. Its threads are for linear algebra; with them, workers could not be forked.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.files.outputs import require_report, write_json_report
from retemper.engine.system import end_with_parent
from retemper.engine.tokenizer.frame import BOS_CHOICES
from retemper.tools.preprocessing.cache import preprocess_into_cache
from retemper.tools.preprocessing.formats import FORMATS
from retemper.tools.preprocessing.inputs.files import describe_inputs
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess, write_signatures_of_part
from retemper.tools.preprocessing.readers.expansion_limit import DEFAULT_EXPANSION
from retemper.tools.preprocessing.report import counts_record, format_report
from retemper.tools.preprocessing.tokenizer_choice import DEFAULT_TOKENIZER


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Tokenize text to an indexed dataset: Megatron-LM's .bin and .idx, and a .json that describes it. "
        "After an interruption, the same command continues the run."
    )
    _add_input(parser.add_argument_group("input"))
    _add_formats(parser.add_argument_group("formats of the input"))
    _add_chat(parser.add_argument_group("conversations"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_fim(parser.add_argument_group("fill-in-the-middle, for code"))
    _add_windows(parser.add_argument_group("windows, for models with a short context"))
    _add_cleaning(parser.add_argument_group("cleaning; the report and the .json count what is left out"))
    _add_output(parser.add_argument_group("output"))
    parser.mark_usual(
        "--input",
        "--json-key",
        "--chat",
        "--model",
        "--tokenizer",
        "--quality",
        "--dedup",
        "--output-prefix",
        "--overwrite",
        "--split",
        "--workers",
    )
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> PreprocessOptions:
    """Parse the command line, by default that of this process."""
    return PreprocessOptions(**vars(build_parser().parse_args(arguments)))


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE|DIR|GLOB|URL|-",
        help=".jsonl, .json, .txt, .md, .html, .csv, .tsv (all also as .gz, .zst, .bz2 and .xz), .parquet, .arrow, "
        ".xlsx, .pdf; a folder means the documents in it, hf://namespace/name a dataset of the Hugging Face Hub, "
        "s3://, gs://, https://... remote files, - standard input. Documents keep the order of the arguments, "
        "and of the paths within a folder or pattern",
    )
    group.add_argument(
        "--hf-split",
        metavar="NAME",
        help="of --input hf://namespace/name: split to read (default: the only one, or train)",
    )
    group.add_argument(
        "--hf-subset", metavar="NAME", help="of --input hf://namespace/name: subset to read (default: the default one)"
    )
    group.add_argument(
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="key or column of the text (default: text; a.b: key b within a); several are joined by blank lines, or by "
        "a template such as '{title}: {body}'",
    )
    group.add_argument(
        "--metadata",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keep these keys of each record in {prefix}.metadata.jsonl, one line of JSON per document",
    )
    group.add_argument(
        "--max-expansion",
        type=int,
        default=DEFAULT_EXPANSION,
        metavar="N",
        help="refuse files that expand to more than N times their size, such as decompression bombs; 0: no limit "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="write malformed records, and the places where files are damaged, to {prefix}.rejects.jsonl and continue "
        "(default: stop at the first)",
    )


def _add_formats(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--txt-mode",
        choices=("file", "line"),
        default="file",
        help="a document of .txt is the file (the default) or a line",
    )
    group.add_argument(
        "--stdin-format", default="jsonl", metavar="FORMAT", help="format of standard input (default: %(default)s)"
    )
    group.add_argument(
        "--input-format",
        metavar="FORMAT",
        help="format of all files of --input (default: by name, and by content if that is ambiguous): "
        + ", ".join(FORMATS),
    )
    group.add_argument(
        "--quoting",
        choices=("auto", "standard", "none"),
        default="auto",
        help="quotation marks in CSV and TSV. standard: RFC 4180; none: they are text; auto (the default): standard "
        "for CSV, none for TSV",
    )
    group.add_argument(
        "--sheet",
        nargs="+",
        default=[],
        metavar="NAME",
        help="sheets of .xlsx workbooks to read (default: those with the text's column)",
    )
    group.add_argument(
        "--pdf-pages", action="store_true", help="a document of a PDF is a page with text (default: the file)"
    )


def _add_chat(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat",
        action="store_true",
        help="records are conversations (messages, ShareGPT, Alpaca): apply the model's chat template and write a loss "
        "mask, {prefix}.mask.bin, which is 1 on the assistant's words",
    )
    group.add_argument("--chat-template", metavar="FILE", help="Jinja template (default: the tokenizer's own)")
    group.add_argument("--chat-date", metavar="YYYY-MM-DD", help="date for templates that write it (default: today)")


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="DIR|NAME",
        help="use the tokenizer of the model to train: a Hugging Face folder, a checkpoint, or a Hub name",
    )
    group.add_argument(
        "--tokenizer",
        metavar="DIR|FILE|NAME",
        help="instead of --model, a tokenizer's folder or file: tokenizer.json, sentencepiece .model, or .tiktoken; or "
        f"a Hugging Face Hub name (default: {DEFAULT_TOKENIZER}, the Qwen2 family's)",
    )
    group.add_argument(
        "--bos",
        choices=BOS_CHOICES,
        default="auto",
        help="begin documents with the BOS. auto: as the tokenizer begins texts (Llama and Mistral: yes, Qwen: "
        "no), and as the chat template begins conversations",
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    group.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="the end-of-document token (default: <|endoftext|> if the tokenizer has it, else its EOS)",
    )
    group.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="special tokens written in the text become control tokens (default: they are text)",
    )
    group.add_argument(
        "--encoder",
        choices=("auto", "fast", "reference"),
        default="auto",
        help="reference: tokenizers, sentencepiece or tiktoken; fast: a fast library, for rules that were compared "
        "with the reference, and checked on samples; auto (the default): fast, unless loading it takes longer than "
        "encoding the input",
    )


def _add_fim(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fim-rate",
        type=float,
        default=0.0,
        metavar="R",
        help="rearrange this share of the documents, so that the model learns to fill a gap between a prefix and a "
        "suffix; for code usually 0.5 (default: 0)",
    )
    group.add_argument(
        "--fim-spm-rate",
        type=float,
        default=0.5,
        metavar="S",
        help="share of the rearranged documents in the order suffix, prefix, middle (SPM); the others are in the order "
        "prefix, suffix, middle (PSM) (default: %(default)s)",
    )
    group.add_argument(
        "--fim-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="the tokens before prefix, suffix and middle, and perhaps one after the middle (default: those of Qwen, "
        "StarCoder, DeepSeek, CodeLlama or CodeGemma that the tokenizer has)",
    )


def _add_windows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="cut longer documents into windows of N tokens, BOS and end-of-document token included; usually "
        "training.sequence_length (default: documents stay whole, and training cuts them where a sequence ends)",
    )
    group.add_argument(
        "--window-overlap",
        type=int,
        default=0,
        metavar="N",
        help="tokens that a window repeats of the one before it, as context for its first words (default: 0)",
    )
    group.add_argument(
        "--window-loss",
        choices=("new", "all"),
        default="new",
        help="new (the default): the repeated tokens have no loss, so that every token is trained on once; all: they "
        "have it again",
    )


def _add_cleaning(group: argparse._ArgumentGroup) -> None:
    _add_text_steps(group)
    group.add_argument("--drop-invalid-utf8", action="store_true", help="leave out documents that are not valid UTF-8")
    group.add_argument("--min-chars", type=int, default=0, metavar="N", help="leave out shorter documents")
    _add_text_filters(group)
    group.add_argument(
        "--min-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out documents with fewer tokens, BOS and EOD included",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="leave out longer documents; of conversations, only the turns that do not fit",
    )
    group.add_argument(
        "--max-documents", type=int, metavar="N", help="keep at most N documents of each --input argument"
    )
    group.add_argument(
        "--dedup",
        choices=("none", "exact", "minhash"),
        default="none",
        help="keep the first of identical documents (exact), or of near-duplicates (minhash)",
    )
    group.add_argument(
        "--dedup-threshold",
        type=float,
        default=0.8,
        metavar="J",
        help="fraction of 5-grams that near-duplicates share (default: %(default)s)",
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out documents that share 13 words in a row with these test sets",
    )


def _add_text_steps(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fix-text",
        action="store_true",
        help="repair wrongly decoded text, such as 'schÃ¶n', character references and control characters, with ftfy",
    )
    group.add_argument(
        "--strip-control", action="store_true", help="remove control characters, except tab and line end"
    )
    group.add_argument("--normalize", choices=("none", "nfc"), default="none", help="Unicode form of the text")
    group.add_argument("--remove-urls", action="store_true", help="remove http://, https://, ftp:// and www. addresses")
    group.add_argument(
        "--collapse-whitespace",
        action="store_true",
        help="replace runs of white space by one space, line feed or empty line; remove it around lines and texts",
    )


def _add_text_filters(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--min-letter-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="leave out documents with a smaller share of letters among the characters other than white space",
    )
    group.add_argument(
        "--languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="leave out documents in other languages; ISO 639 codes, such as en de zh",
    )
    group.add_argument(
        "--min-language-score",
        type=float,
        default=0.65,
        metavar="P",
        help="with --languages, leave out documents whose language is less probable (default: %(default)s)",
    )
    group.add_argument(
        "--quality",
        choices=("none", "gopher", "gopher-any-language"),
        default="none",
        help="leave out documents by Gopher's rules on words, symbols, lines and repetition; gopher-any-language: "
        "without its English stop words",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output-prefix", default="dataset", metavar="PATH", help="default: %(default)s")
    group.add_argument(
        "--to-jsonl",
        nargs="?",
        const="plain",
        choices=("plain", "zst"),
        help="instead of tokens, write the text and the --metadata of the documents to {prefix}.jsonl, or with zst to "
        "{prefix}.jsonl.zst; needs no tokenizer",
    )
    group.add_argument(
        "--cache-folder",
        metavar="DIR",
        help="instead of --output-prefix, write below this folder, under a name made from the contents of the input, "
        "the tokenizer and the options; a dataset that is there already is not made again",
    )
    group.add_argument(
        "--report", metavar="FILE", help="also write the prefixes and counts of the datasets to this file, in JSON"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace an existing dataset when the new one is complete"
    )
    group.add_argument("--shuffle", action="store_true", help="shuffle the documents; see --seed")
    group.add_argument("--seed", type=int, default=0, help="seed of --shuffle and --fim-rate (default: %(default)s)")
    group.add_argument(
        "--split",
        metavar="NAME=SHARE,...",
        help="train=0.98,valid=0.02 writes {prefix}.train and {prefix}.valid; a hash of the document decides its side",
    )
    group.add_argument(
        "--bins",
        metavar="KEY",
        help="write a dataset {prefix}.VALUE for each value of this key of the records, such as a category, and print "
        "the data section of a run that mixes them",
    )
    group.add_argument(
        "--bin-weights",
        default="balanced",
        metavar="WEIGHTS",
        help="weights of the printed mixture: balanced (the default), proportional to the tokens, or alpha=A, "
        "proportional to tokens ** A",
    )
    _add_parts(group)
    group.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores of this machine)")


def _add_parts(group: argparse._ArgumentGroup) -> None:
    """Add the options with which several calls share a corpus."""
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="process part I (from 0) of N, as {prefix}.shard-I-of-N; tools/merge.py joins them. Limits, deduplication "
        "and the shuffle then work within a part",
    )
    group.add_argument(
        "--signatures",
        metavar="DIR",
        help="with --shard and --dedup, write only what deduplication across the parts needs; see "
        "launch/preprocess_datatrove.py",
    )
    group.add_argument(
        "--exclude-documents",
        metavar="FILE",
        help="with --shard and --dedup, leave out these duplicates, which were found across the parts",
    )
    group.add_argument(
        "--list-inputs",
        action="store_true",
        help="instead of preprocessing, print a line of JSON for each input file: path, size, and an identity that "
        "changes with its contents (the time of the last change, or a checksum that the server tells)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    end_with_parent()
    options = parse_arguments(arguments)
    if options.list_inputs:
        for facts in describe_inputs(options.input, options.inputs):
            print(json.dumps(facts._asdict()))
        return
    if options.signatures is not None:
        write_signatures_of_part(options)
        return
    if options.report is not None:
        require_report("--report", options.report)
    if options.cache_folder is None:
        report = preprocess(options)
        sidecars = report.sidecars
        print(format_report(report))
    else:
        sidecars = preprocess_into_cache(options)
        for prefix, sidecar in sidecars.items():
            print(f"{prefix}: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens")
    if options.report is not None:
        write_json_report("--report", options.report, counts_record(sidecars))


if __name__ == "__main__":
    run_command(main)
