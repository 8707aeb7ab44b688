"""The preprocess command against the bare tokenizer and against Megatron-LM's loop, on one corpus, in one run.

Everything that is measured runs as a process of its own, one after another. MB are of text in UTF-8, 10^6 bytes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.sidecar import Sidecar
from ...engine.data.tokenizer import TokenizerHandle, load_tokenizer
from ...engine.errors import UserError
from . import limit as limit_program
from . import peer as peer_program
from .corpora import Corpus, beginning, describe, repeated
from .measure import Cost, measure

COMMAND = Path(__file__).parents[1] / "preprocess.py"
PEER_LABEL = "Megatron-LM's loop, rebuilt on megatron-core's IndexedDatasetBuilder"
REQUIRED_OF_LIMIT = 0.8
REQUIRED_OF_PEER = 12.0
_BATCH_MEGACHARACTERS = (1, 4, 16)


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is to be measured."""

    input: Path
    tokenizer: str
    workers: int
    json_key: str = "text"
    repeat: int = 1
    runs: int = 3
    """Of our command, of which the best counts; the limit is the best of six, the peer runs once."""
    peer: bool = False
    peer_megabytes: float = 20.0
    scratch: Path | None = None


@dataclass
class Results:
    """What was measured; goes to the results file as it is."""

    corpus: dict[str, Any]
    limit: list[dict[str, Any]] = field(default_factory=list)
    """Of each batch size and number of threads."""
    ours: list[Cost] = field(default_factory=list)
    ours_start: Cost | None = None
    """On a corpus of one line."""
    peer: Cost | None = None
    peer_start: Cost | None = None
    peer_corpus: dict[str, Any] | None = None
    checks: list[str] = field(default_factory=list)
    """What was compared, and that it agreed."""
    summary: dict[str, Any] = field(default_factory=dict)


def run_benchmark(options: BenchmarkOptions) -> Results:
    """Measure, compare the outputs, and sum up.

    Raises:
        UserError: a command fails, or outputs differ; megatron-core is missing, which the peer is built on.
    """
    if options.peer and importlib.util.find_spec("megatron") is None:
        raise UserError("--peer needs megatron-core: pip install --no-deps megatron-core==0.16.1")
    original = describe(options.input, options.json_key)
    tokenizer = load_tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="benchmark-") as name:
        folder = Path(name)
        corpus = repeated(original, options.repeat, folder)
        one_line = beginning(original, options.json_key, 1, folder)
        results = Results({**_facts(corpus), "name": original.path.name, "repeated": options.repeat})
        _say(f"the bare tokenizer, {tokenizer.encoder}, on {original.text_bytes / 1e6:,.1f} MB")
        results.limit = _measure_limit(options, original)
        ours = folder / "ours" / "dataset"
        _say(f"our command, {options.workers} workers, on {corpus.text_bytes / 1e6:,.1f} MB")
        results.ours_start = min(
            (_preprocess(options, one_line, folder / f"start-{n}" / "dataset") for n in range(options.runs)), key=_cpu
        )
        for number in range(options.runs):
            results.ours.append(_preprocess(options, corpus, ours.with_name("dataset" if number == 0 else f"n{number}")))
        sidecar = Sidecar.read(ours)
        assert sidecar is not None
        results.checks.append(_check_tokens(results.limit, sidecar, options.repeat))
        if options.peer:
            part = beginning(corpus, options.json_key, int(options.peer_megabytes * 1e6), folder)
            results.peer_corpus = _facts(part)
            _say(f"{PEER_LABEL}, on {part.text_bytes / 1e6:,.1f} MB")
            results.peer_start = _run_peer(options, tokenizer, one_line, folder / "peer-start")
            results.peer = _run_peer(options, tokenizer, part, folder / "peer")
            results.checks.append(compare_datasets(ours, folder / "peer"))
    results.summary = summarize(results)
    return results


def _say(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)


def _facts(corpus: Corpus) -> dict[str, Any]:
    return {"documents": corpus.documents, "text_bytes": corpus.text_bytes}


def _cpu(cost: Cost) -> float:
    return cost.cpu_seconds


def _measure_limit(options: BenchmarkOptions, corpus: Corpus) -> list[dict[str, Any]]:
    """The bare tokenizer with one thread a core and with one alone, in batches of several sizes."""
    measured = []
    for threads in sorted({1, options.workers}):
        for batch in _BATCH_MEGACHARACTERS:
            command = [sys.executable, "-m", limit_program.__name__, "--input", str(corpus.path)]
            command += ["--tokenizer", options.tokenizer, "--json-key", options.json_key]
            command += ["--documents", str(corpus.documents), "--batch-characters", str(batch * 10**6)]
            measured.append(json.loads(measure(command, limit_program.environment(threads))[1]))
    return measured


def _preprocess(options: BenchmarkOptions, corpus: Corpus, prefix: Path) -> Cost:
    command = [sys.executable, str(COMMAND), "--input", str(corpus.path), "--tokenizer", options.tokenizer]
    command += ["--json-key", options.json_key, "--workers", str(options.workers), "--output-prefix", str(prefix)]
    return measure(command)[0]


def _run_peer(options: BenchmarkOptions, tokenizer: TokenizerHandle, corpus: Corpus, prefix: Path) -> Cost:
    command = [sys.executable, "-m", peer_program.__name__, "--input", str(corpus.path)]
    command += ["--tokenizer", str(tokenizer.file), "--json-key", options.json_key]
    command += ["--eod-id", str(tokenizer.eod()[1]), "--vocab-size", str(tokenizer.vocab_size)]
    return measure([*command, "--workers", str(options.workers), "--output-prefix", str(prefix)])[0]


def _check_tokens(limit: Sequence[dict[str, Any]], sidecar: Sidecar, repeat: int) -> str:
    """Our dataset holds as many tokens as the bare tokenizer gave, besides one document end a document.

    Raises:
        UserError: it does not.
    """
    counts = {one["tokens"] for one in limit}
    ours = sidecar.tokens - (sidecar.documents if sidecar.append_eod else 0)
    if {count * repeat for count in counts} != {ours}:
        raise UserError(f"the bare tokenizer gave {counts} tokens x {repeat}, our dataset holds {ours} besides its ends")
    return f"as many tokens as the bare tokenizer, {ours:,}, besides one end a document"


def compare_datasets(ours: Path, peer: Path) -> str:
    """Require that the documents of ``peer`` are the first of ``ours``, token for token.

    Raises:
        UserError: they are not, with the first document that differs.
    """
    left, right = IndexedDataset(ours), IndexedDataset(peer)
    count = right.num_sequences
    lengths = right.sequence_lengths
    same = np.array_equal(left.sequence_lengths[:count], lengths)
    total = right.num_tokens
    step = 1 << 24
    if not same or not all(
        np.array_equal(left.tokens(start, min(start + step, total)), right.tokens(start, min(start + step, total)))
        for start in range(0, total, step)
    ):
        raise UserError(f"{ours} and {peer} differ in document {_first_difference(left, right)}")
    return f"token for token the dataset of Megatron-LM's loop, on its {count:,} documents with {total:,} tokens"


def _first_difference(left: IndexedDataset, right: IndexedDataset) -> int:
    for number in range(min(left.num_sequences, right.num_sequences)):
        ranges = [(data.sequence_start(number), data.sequence_start(number + 1)) for data in (left, right)]
        if not np.array_equal(left.tokens(*ranges[0]), right.tokens(*ranges[1])):
            return number
    return min(left.num_sequences, right.num_sequences)


def summarize(results: Results) -> dict[str, Any]:
    """Rates and ratios."""
    assert results.ours_start is not None
    size = results.corpus["text_bytes"] / 1e6
    best = max(results.limit, key=lambda one: one["text_bytes"] / one["cpu_seconds"])
    limit = best["text_bytes"] / 1e6 / best["cpu_seconds"]
    ours = min(results.ours, key=_cpu)
    wall = min(cost.wall_seconds for cost in results.ours)
    start = results.ours_start
    found: dict[str, Any] = {
        "limit_mb_per_cpu_second": limit,
        "limit_mb_per_second": max(one["text_bytes"] / 1e6 / one["wall_seconds"] for one in results.limit),
        "limit_is": f"{best['encoder']}, {best['threads']} threads, batches of {best['batch_megacharacters']:g} M characters",
        "ours_mb_per_cpu_second": size / ours.cpu_seconds,
        "ours_mb_per_cpu_second_without_start": size / (ours.cpu_seconds - start.cpu_seconds),
        "ours_mb_per_second": size / wall,
        "ours_mb_per_second_without_start": size / (wall - start.wall_seconds),
        "ours_peak_mb": max(cost.peak_mb for cost in results.ours),
    }
    found["ratio_to_limit"] = found["ours_mb_per_cpu_second"] / limit
    found["ratio_to_limit_without_start"] = found["ours_mb_per_cpu_second_without_start"] / limit
    if results.peer is not None and results.peer_start is not None and results.peer_corpus is not None:
        part = results.peer_corpus["text_bytes"] / 1e6
        peer = Cost(**{k: v - getattr(results.peer_start, k) for k, v in asdict(results.peer).items()})
        # What the peer would take for the whole corpus, if it measured only a part: its start once, then its rate.
        whole = results.peer_start.wall_seconds + peer.wall_seconds * size / part
        found |= {
            "peer_mb_per_cpu_second": part / results.peer.cpu_seconds,
            "peer_mb_per_cpu_second_without_start": part / peer.cpu_seconds,
            "peer_mb_per_second": size / whole,
            "peer_mb_per_second_without_start": part / peer.wall_seconds,
            "peer_peak_mb": results.peer.peak_mb,
            "peer_extrapolated": part != size,
            "wall_ratio_to_peer": whole / wall,
            "wall_ratio_to_peer_without_start": part / peer.wall_seconds and (
                found["ours_mb_per_second_without_start"] / (part / peer.wall_seconds)
            ),
        }
    return found
