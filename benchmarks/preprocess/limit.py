"""Measure the bare tokenizer: documents from memory in big batches, without reading, parsing or writing.

Run as a process of its own. It uses the same encoder as the preprocess command: the fastest one that gives the
reference's ids. Loading documents and tokenizer is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...engine.errors import UserError, run_command
from ...tools.tokenizer.handle import load_tokenizer
from .corpora import read_texts


def batches_of(texts: Iterable[str], characters: int) -> list[list[str]]:
    """Divide ``texts`` into lists of about ``characters``."""
    batches: list[list[str]] = [[]]
    room = characters
    for text in texts:
        if room <= 0:
            batches.append([])
            room = characters
        batches[-1].append(text)
        room -= len(text)
    return batches


def environment(threads: int) -> dict[str, str]:
    """Return environment variables that make the tokenizer libraries use ``threads``, without busy waiting."""
    return {
        "RAYON_NUM_THREADS": str(threads),
        "FASTOKENS_BPE_THREADS": str(threads),
        "FASTOKENS_SPIN_US": "0",
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }


def main() -> None:
    """Run ``python -m retemper.benchmarks.preprocess.limit``: print the measurements as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--json-key")
    parser.add_argument("--repeat", type=int)
    parser.add_argument("--batch-characters", type=int)
    options = parser.parse_args()
    texts = list(read_texts(options.input, options.json_key))
    batches = batches_of(texts, options.batch_characters)
    tokenizer = load_tokenizer(options.tokenizer)
    with suppress(UserError):
        tokenizer.eod()  # may change which token is ordinary text
    tokenizer.encode_flat(["a"])
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = sum(len(tokenizer.encode_flat(batch)[0]) for _ in range(options.repeat) for batch in batches)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if tokenizer.fast_path_failures:
        raise UserError(
            f"{tokenizer.encoder} failed on {tokenizer.fast_path_failures} batches, so this is not its speed"
        )
    record = {
        "encoder": tokenizer.encoder,
        "threads": int(os.environ["RAYON_NUM_THREADS"]),
        "batch_megacharacters": options.batch_characters / 1e6,
        "tokens": tokens,
        "text_bytes": options.repeat * sum(len(text.encode()) for text in texts),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    run_command(main)
