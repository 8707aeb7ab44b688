"""Compare the loader's start and samples with Megatron-LM's GPTDataset on corpora of up to 100 million documents.

    pip install --no-deps megatron-core==0.16.1
    python benchmarks/loader.py

The indexes are real. Their token files are sparse, to save 1.6 TB, so times on them do not include a disk. The cost of
a disk is measured on a smaller corpus whose tokens are written out and evicted from the page cache.
Every measurement is made several times, each in a process of its own after its imports, and the median is used.
Writes benchmarks/results/loader.json and prints the tables of docs/benchmarks.md, "Loading". Needs about 12 GB of disk
(in ``TMPDIR``) and, for Megatron at 100 million documents, 8 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retemper.benchmarks.machine import describe_machine
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.benchmarks.timing import held_bytes, peak_bytes, reset_peak, time_calls
from retemper.benchmarks.token_files import write_dataset
from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.settings import DataConfig, SourceConfig
from retemper.engine.data.catalog import open_catalog
from retemper.engine.data.loader import TrainingData
from retemper.engine.data.packing import pack
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import require_report
from retemper.engine.observe.start_summary import describe_data
from retemper.engine.schedule import BatchPlan
from retemper.engine.system import require_linux

SEQUENCE_LENGTH = 4096
MEAN_TOKENS = 4000
VOCAB_SIZE = 151_936
BATCH = 64
"""Samples of the first batch."""
SEED = 1234
MODES = {
    "retemper": ("concat", "windows"),
    "retemper, documents shuffled": ("concat", "documents"),
    "retemper, best_fit": ("best_fit", "documents"),
}
MEGATRON = "megatron-core"
RESULT = Path(__file__).parent / "results" / "loader.json"


# --------------------------------------------------------------------------------------------------------------------
# Corpora


def make_corpus(prefix: Path, documents: int, sparse: bool) -> int:
    """Make a dataset of int32 tokens whose documents have log-normal lengths; return its number of tokens."""
    generator = np.random.default_rng(SEED)
    lengths = np.empty(documents, np.int32)
    for first in range(0, documents, 1 << 20):
        part = lengths[first : first + (1 << 20)]
        part[:] = generator.lognormal(math.log(MEAN_TOKENS) - 0.72, 1.2, len(part)).clip(1, 1 << 20)
    tokens = int(lengths.sum(dtype=np.int64))
    blocks = (
        () if sparse else (np.arange(n, min(tokens, n + (1 << 24))) % VOCAB_SIZE for n in range(0, tokens, 1 << 24))
    )
    index_hash = write_dataset(prefix, np.int32, lengths, blocks)
    sidecar = Sidecar(
        "none", "0" * 64, VOCAB_SIZE, False, None, None, (), {}, "int32", documents, tokens, VOCAB_SIZE - 1, "0" * 32
    )
    record = json.loads(sidecar.to_json()) | {"idx_xxh3_128": index_hash}
    Path(f"{prefix}.json").write_text(json.dumps(record), encoding="utf-8")
    return tokens


def evict(prefix: Path) -> None:
    """Evict the dataset's files from the page cache."""
    for suffix in (".idx", ".bin"):
        descriptor = os.open(f"{prefix}{suffix}", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------------
# The two loaders: each returns a function that makes sample i ready for the model, and the number of samples


Opened = tuple[Callable[[int], Any], int]


def open_retemper(prefix: Path, name: str) -> Opened:
    """Do everything that a training run does with its data before its first step."""
    packing, shuffle = MODES[name]
    config = DataConfig(train=[SourceConfig(str(prefix))], packing=packing, shuffle=shuffle)  # type: ignore[arg-type]
    plan = BatchPlan(SEQUENCE_LENGTH, BATCH, 1, 1)
    catalog = open_catalog(config, plan, VOCAB_SIZE, None, SEED)
    order = catalog.sample_order(SEED)
    count = sum(source.num_chunks for source in catalog.train)
    order.require(count)
    describe_data(config, catalog, order, count)
    data = TrainingData(catalog.train, order, plan, 0, VOCAB_SIZE, attend_across_documents=False)

    def sample(index: int) -> Any:
        place = data.order.sample(index)
        chunk = data.sources[place.source].chunk(place.chunk, VOCAB_SIZE, place.epoch)
        return pack([chunk], SEQUENCE_LENGTH, attend_across_documents=False)

    return sample, count


def open_megatron(prefix: Path, tokens: int, cache: Path) -> Opened:
    """Open one epoch of a GPTDataset, with its defaults and the fewest masks; the index caches are written to
    ``cache``.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, pad = VOCAB_SIZE, 0, -1
        unique_identifiers = {"class": "none"}  # noqa: RUF012

    count = (tokens - 1) // SEQUENCE_LENGTH * 99 // 100
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        blend=([str(prefix)], None),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config).build()[0]
    return dataset.__getitem__, count


# --------------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own


CPU = torch.device("cpu")


def disk_bytes() -> int:
    """Return the bytes that this process has caused to be read from disks, with page faults and read-ahead."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def sample_seconds(sample: Callable[[int], Any], indices: Sequence[int]) -> list[float]:
    """Return the seconds that each sample takes."""
    remaining = iter(indices)
    return time_calls(lambda: sample(next(remaining)), len(indices), CPU)


def measure(name: str, prefix: Path, tokens: int, cache: Path, samples: int) -> dict[str, float]:
    """Measure start, first batch and random samples of the loader ``name``."""
    if name == MEGATRON:
        import megatron.core.datasets.gpt_dataset  # noqa: F401
    evict(prefix)
    if not reset_peak(CPU):
        raise UserError("/proc/self/clear_refs cannot be written, so the peak of the start is unknown")
    before = held_bytes(CPU)
    clock = time.perf_counter()
    sample, count = open_megatron(prefix, tokens, cache) if name == MEGATRON else open_retemper(prefix, name)
    result = {"start_seconds": time.perf_counter() - clock, "start_peak_bytes": peak_bytes(CPU) - before}

    result["first_batch_seconds"] = sum(sample_seconds(sample, range(BATCH)))

    chosen = random.Random(SEED).sample(range(BATCH, count), samples)
    usage, read = resource.getrusage(resource.RUSAGE_SELF), disk_bytes()
    times = sample_seconds(sample, chosen)
    result["first_visit_us"] = 1e6 * statistics.fmean(times)  # the mean: some visits wait for the disk
    result["first_visit_disk_bytes"] = (disk_bytes() - read) / samples
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - usage.ru_majflt
    result["first_visit_major_faults"] = faults / samples
    result["again_us"] = 1e6 * statistics.median(sample_seconds(sample, chosen))
    result["end_bytes"] = held_bytes(CPU) - before
    result["cache_bytes"] = sum(file.stat().st_size for file in cache.rglob("*")) if cache.exists() else 0
    return result


def measured(name: str, prefix: Path, tokens: int, samples: int, repeats: int) -> dict[str, Any]:
    """Return the medians of ``repeats`` processes, each with empty caches, and all their values."""
    runs = []
    for _ in range(repeats):
        cache = prefix.parent / "cache"
        command = [sys.executable, __file__, "--measure", name, str(prefix), str(tokens), str(cache), str(samples)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
        shutil.rmtree(cache, ignore_errors=True)
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in medians.items()), file=sys.stderr)
    return {"loader": name, **medians, "runs": runs}


# --------------------------------------------------------------------------------------------------------------------
# The whole


def benchmark(options: argparse.Namespace, folder: Path) -> BenchmarkReport:
    """Measure all corpora and loaders, one after another."""
    settings = {"sequence_length": SEQUENCE_LENGTH, "samples": options.samples, "repeats": options.repeats}
    machine = {**describe_machine(), "read_ahead_kib": read_ahead(folder)}
    report = BenchmarkReport(command_line("benchmarks/loader.py"), machine, settings)
    plans = [(count, True) for count in options.documents] + [(options.disk_documents, False)]
    for documents, sparse in plans:
        prefix = folder / "corpus"
        tokens = make_corpus(prefix, documents, sparse)
        print(f"{documents:,} documents, {tokens:,} tokens{'' if sparse else ', on disk'}", file=sys.stderr)
        names = [*MODES, MEGATRON] if documents <= options.megatron_up_to else [*MODES]
        corpus = {"documents": documents, "tokens": tokens, "sparse": sparse}
        corpus |= {f"{suffix}_bytes": os.path.getsize(f"{prefix}.{suffix}") for suffix in ("bin", "idx")}
        report.rows += [corpus | measured(name, prefix, tokens, options.samples, options.repeats) for name in names]
        for file in folder.glob("corpus.*"):
            file.unlink()
    return report


def read_ahead(folder: Path) -> int | None:
    """Return the KiB that Linux reads from the folder's disk at a page fault, which determine its cost."""
    device = os.stat(folder).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    queues = [path for path in (block / "queue", block.resolve().parent / "queue") if path.is_dir()]
    return int((queues[0] / "read_ahead_kb").read_text()) if queues else None


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the tables of docs/benchmarks.md: of sparse corpora, and of the one on disk."""
    sparse, on_disk = [], []
    for row in rows:
        if row["sparse"]:
            cells = {
                "Documents": f"{row['documents'] / 1e6:g}M",
                "Tokens": f"{row['tokens'] / 1e9:.1f}B",
                "Loader": row["loader"],
                "Start": f"{row['start_seconds']:.3f} s",
                "Memory, start": f"{row['start_peak_bytes'] / 1e6:,.0f} MB",
                f"First {BATCH} samples": f"{1e3 * row['first_batch_seconds']:,.0f} ms",
                "One sample": f"{row['again_us']:,.0f} us",
                "Memory, end": f"{row['end_bytes'] / 1e6:,.0f} MB",
                "Cache files": f"{row['cache_bytes'] / 1e6:,.0f} MB",
            }
            sparse.append(cells)
        else:
            cells = {
                "Loader": row["loader"],
                "Sample not in the page cache": f"{row['first_visit_us']:,.0f} us",
                "Read from disk for it": f"{row['first_visit_disk_bytes'] / 1e3:,.0f} kB",
                "Faults that wait for the disk": f"{row['first_visit_major_faults']:.2f}",
                "Once cached": f"{row['again_us']:,.0f} us",
            }
            on_disk.append(cells)
    found = [table([*some[0]], [[*cells.values()] for cells in some]) for some in (sparse, on_disk) if some]
    return "\n\n".join("\n".join(lines) for lines in found)


def main() -> None:
    """Run the command line of this process."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="sizes of the corpora")
    parser.add_argument(
        "--megatron-up-to", type=int, default=10**8, help="measure Megatron on corpora of up to this many documents"
    )
    parser.add_argument(
        "--disk-documents", type=int, default=500_000, help="documents of the corpus that is written out"
    )
    parser.add_argument("--samples", type=int, default=1000, help="random samples")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_linux("measuring page faults")
    if options.measure:
        warnings.simplefilter("ignore")
        name, prefix, tokens, cache, samples = options.measure
        print(json.dumps(measure(name, Path(prefix), int(tokens), Path(cache), int(samples))))
        return
    if options.megatron_up_to and importlib.util.find_spec("megatron") is None:
        sys.exit("megatron-core is not installed: pip install --no-deps megatron-core==0.16.1, or --megatron-up-to 0")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    require_report("--output", options.output)
    with tempfile.TemporaryDirectory() as folder:
        report = benchmark(options, Path(folder))
    report.write(options.output, "--output")
    print(tables(report.rows))


if __name__ == "__main__":
    run_command(main)
