"""Define the common command-line options of the conversion commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ...files.atomic import require_absent
from ..hugging_face.weight_options import AUTO, DEFAULT_MAX_SHARD_SIZE, DTYPE_CHOICES, parse_shard_size
from ..workers import parse_workers

HF, CHECKPOINT = TARGET_FORMATS = ("hf", "checkpoint")
"""Outputs of a conversion from Megatron: a Hugging Face folder, or a checkpoint for the trainer."""


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and refuse errors that can be found without PyTorch, whose import takes seconds.

    Raises:
        UserError: names the option.
    """
    options = parser.parse_args(arguments)
    require_absent(options.output)
    parse_workers(options.workers)
    if hasattr(options, "max_shard_size"):
        parse_shard_size(options.max_shard_size)
    return options


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``."""
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must not exist")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--dtype``; ``default`` describes the meaning of auto."""
    help_text = f"dtype of the weights (default: {default})"
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default=AUTO, help=help_text)


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-shard-size``."""
    help_text = "largest safetensors file (default: %(default)s)"
    parser.add_argument("--max-shard-size", default=DEFAULT_MAX_SHARD_SIZE, metavar="SIZE", help=help_text)


def add_copying(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-nonfinite``, ``--workers`` and ``--verify``."""
    add_allow_nonfinite(parser)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of threads that copy tensors (default: one for each CPU, up to 8)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also compare logits with transformers, on the CPU; needs 4 bytes of memory per parameter",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-remote-code``."""
    help_text = "run the code that comes with a model whose type transformers does not know (default: refuse it)"
    parser.add_argument("--trust-remote-code", action="store_true", help=help_text)


def add_allow_nonfinite(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-nonfinite``."""
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="copy weights that are NaN or infinite (default: refuse them)"
    )
