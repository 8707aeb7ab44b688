"""Megatron-LM's loop, rebuilt on megatron-core's IndexedDatasetBuilder. Run as a process of its own.

Reimplements the known behaviour of Megatron-LM's tools/preprocess_data.py for comparison. One process reads lines. A
pool parses and tokenizes each line separately and pickles its ids back as a list. The one process adds documents one
by one. Its own wrapper classes around the tokenizer are left out, which is to its advantage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

_LINES_AT_ONCE = 32
_state: dict[str, Any] = {}


def _start(tokenizer: str, key: str, eod_id: int) -> None:
    from ...engine.tokenizer.json_file import parse_tokenizer

    loaded = parse_tokenizer(Path(tokenizer).read_bytes(), tokenizer)
    loaded.encode_special_tokens = True
    _state.update(tokenizer=loaded, key=key, eod_id=eod_id)


def _encode(line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    key = _state["key"]
    ids = _state["tokenizer"].encode(json.loads(line)[key], add_special_tokens=False).ids
    if ids:
        ids.append(_state["eod_id"])
    return {key: ids}, {key: [len(ids)] if ids else []}, len(line)


def main() -> None:
    """Run ``python -m retemper.benchmarks.preprocess.peer``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", type=Path)
    parser.add_argument("--tokenizer", help="tokenizer.json")
    parser.add_argument("--json-key")
    parser.add_argument("--eod-id", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--output-prefix")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    settings = (options.tokenizer, options.json_key, options.eod_id)
    builder = IndexedDatasetBuilder(f"{options.output_prefix}.bin", dtype=DType.optimal_dtype(options.vocab_size))
    with (
        open(options.input, encoding="utf-8") as lines,
        multiprocessing.get_context("fork").Pool(options.workers, _start, settings) as pool,
    ):
        filled = (line for line in lines if not line.isspace())
        for documents, lengths, _ in pool.imap(_encode, filled, _LINES_AT_ONCE):
            for key, ids in documents.items():
                builder.add_document(ids, lengths[key])
        builder.finalize(f"{options.output_prefix}.idx")
        pool.close()
        pool.join()


if __name__ == "__main__":
    main()
