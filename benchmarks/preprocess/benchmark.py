"""Compare the preprocess command with the bare tokenizer and with Megatron-LM's loop, on one corpus, in one run.

Every measured program runs as a process of its own, one after another. MB are of text in UTF-8, 10^6 bytes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.data.indexed_dataset import IndexedDataset
from ...engine.data.sidecar import Sidecar
from ...engine.errors import UserError
from ...engine.system import usable_cores
from ...tools.tokenizer.handle import TokenizerHandle, load_tokenizer
from ..process_tree import Cost, measure
from . import limit as limit_program
from . import peer as peer_program
from .corpora import BenchmarkCorpus, beginning, describe, repeated
from .memory import MemoryUse, check_memory

COMMAND = Path(__file__).parents[2] / "tools" / "preprocess.py"
BATCH_MEGACHARACTERS = (1, 4, 16)
_STEP = 1 << 24  # tokens compared at once


@dataclass(frozen=True)
class PreprocessBenchmarkOptions:
    """Settings of the measurement. The fields are the command's flags, under the same names."""

    input: Path
    tokenizer: str
    json_key: str = "text"
    workers: int | None = None
    """None: the usable cores."""
    repeat: int = 1
    runs: int = 3
    megatron: bool = False
    megatron_megabytes: float = 20.0
    memory_check: bool = False
    memory_megabytes: tuple[float, float] = (1000.0, 4000.0)
    scratch: Path | None = None

    def check(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: names the flag, its value and the remedy.
        """
        for name in ("workers", "repeat", "runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1")
        for flag, number in (
            ("megatron-megabytes", self.megatron_megabytes),
            ("memory-megabytes", min(self.memory_megabytes)),
        ):
            if not number > 0:
                raise UserError(f"--{flag} {number:g}: must be more than 0")
        if self.megatron and importlib.util.find_spec("megatron") is None:
            raise UserError("--megatron needs megatron-core: pip install --no-deps megatron-core==0.16.1")
        if self.scratch is not None and not self.scratch.is_dir():
            raise UserError(f"--scratch {self.scratch}: no such folder; create it, or leave the flag out")


@dataclass
class Results:
    """The measurements."""

    corpus: BenchmarkCorpus
    """The corpus, repeated as requested."""
    workers: int
    limit: list[dict[str, Any]] = field(default_factory=list)
    """Output of limit.py for each round, number of threads and batch size."""
    ours: list[Cost] = field(default_factory=list)
    """One for each round."""
    ours_start: list[Cost] = field(default_factory=list)
    """One for each round, on a corpus of one line."""
    megatron: Cost | None = None
    megatron_start: Cost | None = None
    """Measured on a corpus of one line."""
    megatron_text_bytes: int = 0
    """Size of its part of the corpus, the beginning."""
    memory: list[MemoryUse] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    """Descriptions of successful comparisons."""


def run_benchmark(options: PreprocessBenchmarkOptions) -> Results:
    """Measure, and compare the outputs.

    Raises:
        UserError: wrong options, a command fails, or outputs differ.
    """
    options.check()
    original = describe(options.input, options.json_key)
    tokenizer = load_tokenizer(options.tokenizer)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="benchmark-") as name:
        folder = Path(name)
        corpus = repeated(original, options.repeat, folder)
        one_line = beginning(original, options.json_key, 1, folder)
        results = Results(corpus, options.workers or usable_cores())
        bench = Bench(options, results)
        for number in range(options.runs):
            # Alternating, so that a slower minute of the machine affects both.
            _say(f"round {number + 1} of {options.runs}: the bare tokenizer, on {corpus.text_bytes / 1e6:,.1f} MB")
            results.limit += bench.measure_limit(original)
            _say(f"round {number + 1} of {options.runs}: the preprocess command, {results.workers} workers")
            # By itself the command would encode one line with the reference, which loads faster.
            is_fast = results.limit[-1]["encoder"].startswith("fastokens")
            encoder = ["--encoder", "fast" if is_fast else "reference"]
            results.ours_start.append(bench.preprocess(one_line, folder / f"start-{number}", *encoder))
            results.ours.append(bench.preprocess(corpus, folder / f"ours-{number}"))
        results.checks.append(check_tokens(results.limit, folder / "ours-0"))
        if options.megatron:
            part = beginning(corpus, options.json_key, options.megatron_megabytes * 1e6, folder)
            _say(f"Megatron-LM's loop, {results.workers} workers, on {part.text_bytes / 1e6:,.1f} MB")
            results.megatron_start = bench.run_peer(tokenizer, one_line, folder / "megatron-start")
            results.megatron = bench.run_peer(tokenizer, part, folder / "megatron")
            results.megatron_text_bytes = part.text_bytes
            results.checks.append(compare_datasets(folder / "ours-0", folder / "megatron"))
        if options.memory_check:
            _say("memory: one long synthetic document, and many short ones")
            sizes = options.memory_megabytes
            results.memory = check_memory(bench.preprocess, options.json_key, sizes, results.workers, folder)
    return results


def _say(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)


class Bench:
    """Runs the compared commands with the same options."""

    def __init__(self, options: PreprocessBenchmarkOptions, results: Results) -> None:
        self._common = ["--tokenizer", options.tokenizer, "--json-key", options.json_key]
        self._repeat = options.repeat
        self._workers = results.workers

    def measure_limit(self, original: BenchmarkCorpus) -> list[dict[str, Any]]:
        """Measure the bare tokenizer with one thread per core and with one thread, in batches of several sizes."""
        measured = []
        for threads in sorted({1, self._workers}):
            for batch in BATCH_MEGACHARACTERS:
                command = [sys.executable, "-m", limit_program.__name__, "--input", str(original.path), *self._common]
                command += ["--repeat", str(self._repeat), "--batch-characters", str(batch * 10**6)]
                measured.append(json.loads(measure(command, limit_program.environment(threads))[1]))
        return measured

    def preprocess(self, corpus: BenchmarkCorpus, prefix: Path, *more: str) -> Cost:
        """Run the preprocess command, with the options ``more``."""
        # Neither the bare tokenizer nor Megatron-LM's loop writes a BOS.
        command = [sys.executable, str(COMMAND), "--input", str(corpus.path), *self._common, *more, "--bos", "no"]
        return measure([*command, "--workers", str(self._workers), "--output-prefix", str(prefix)])[0]

    def run_peer(self, tokenizer: TokenizerHandle, corpus: BenchmarkCorpus, prefix: Path) -> Cost:
        """Run Megatron-LM's loop."""
        if tokenizer.kind != "tokenizer.json":
            raise UserError(
                f"--megatron: {tokenizer.file} is not a tokenizer.json; use one, or measure without --megatron"
            )
        command = [sys.executable, "-m", peer_program.__name__, "--input", str(corpus.path), *self._common]
        command += ["--tokenizer", str(tokenizer.file), "--eod-id", str(tokenizer.eod()[1])]
        command += ["--vocab-size", str(tokenizer.vocab_size), "--workers", str(self._workers)]
        return measure([*command, "--output-prefix", str(prefix)])[0]


def check_tokens(limit: Sequence[dict[str, Any]], ours: Path) -> str:
    """Require that the dataset ``ours`` has as many tokens as the bare tokenizer gave, apart from document ends.

    Raises:
        UserError: it does not.
    """
    sidecar = Sidecar.read(ours)
    assert sidecar is not None
    tokens = sidecar.tokens - sidecar.documents * (sidecar.append_eod + len(sidecar.eos_ids or ()))
    for one in limit:
        if one["tokens"] != tokens:
            raise UserError(
                f"{one['encoder']} gave {one['tokens']:,} tokens, but {ours} holds {tokens:,} apart from document ends"
            )
    return f"as many tokens as the bare tokenizer, {tokens:,}, plus one end per document"


def compare_datasets(ours: Path, peer: Path) -> str:
    """Require that the documents of ``peer`` are the first of ``ours``, token for token.

    Raises:
        UserError: they are not; names the first document that differs.
    """
    left, right = IndexedDataset(ours), IndexedDataset(peer)
    count, total = right.num_sequences, right.num_tokens
    same = np.array_equal(left.sequence_lengths[:count], right.sequence_lengths) and all(
        np.array_equal(left.tokens(start, min(start + _STEP, total)), right.tokens(start, min(start + _STEP, total)))
        for start in range(0, total, _STEP)
    )
    if not same:
        number = next(
            (n for n in range(min(count, len(left))) if not np.array_equal(left[n], right[n])), min(count, len(left))
        )
        raise UserError(f"{ours} and {peer} differ in document {number}")
    return f"the same tokens as Megatron-LM's loop writes, on its {count:,} documents with {total:,} tokens"
