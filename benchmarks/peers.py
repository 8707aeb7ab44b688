"""Compare the training step with its peers': the same model, weights, tokens and AdamW settings in each engine.

    pip install --no-deps accelerate litgpt lightning lightning-utilities torchmetrics liger-kernel
    python benchmarks/peers.py --layers 4 --hidden 256 --vocab 32000 --batch 4 --sequence 512 --precision fp32
    python benchmarks/peers.py --model qwen2.5-0.5b --batch 4 --sequence 4096 --precision bf16

Every engine runs in a fresh process: transformers' Trainer (eager, with torch.compile, with regional compilation, with
Liger's kernels, with a chunked loss as in torchtitan), a plain PyTorch loop, LitGPT's pretraining step, and this
repository's trainer (also with FSDP2, which one rank does without). An engine whose losses differ from ours has not
done the same work, and its row is rejected. Peers that are not installed are named. With --compile all engines are
compiled, on a CPU too. --json writes all measurements after every engine, and --compare takes our measurement from such
a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retemper.benchmarks.machine import describe_torch
from retemper.benchmarks.peer_engines.job import BATCHES_FILE, DATASET, Job
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.benchmarks.token_files import write_dataset
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.files.outputs import require_report

OURS = "retemper"
NEEDS = {
    "trainer": ("transformers", "accelerate"),
    "trainer+compile": ("transformers", "accelerate"),
    "trainer+regional": ("transformers", "accelerate"),
    "trainer+liger": ("transformers", "accelerate", "liger_kernel"),
    "trainer+chunked": ("transformers", "accelerate"),
    "trainer+compile+chunked": ("transformers", "accelerate"),
    "loop": ("transformers",),
    "loop+compile": ("transformers",),
    "loop+chunked": ("transformers",),
    "litgpt": ("litgpt", "lightning"),
    "litgpt+compile": ("litgpt", "lightning"),
    OURS: (),
    f"{OURS}+fsdp": (),
}
"""Modules that each engine needs, by their import names."""
QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
MODELS = {
    # Hugging Face config.json of Qwen/Qwen2.5-0.5B and Qwen/Qwen2.5-7B
    "qwen2.5-0.5b": {
        **QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2, "bf16-states": 2e-2}
"""Maximum difference of the first loss from ours, in nats. It allows rounding in the named precision; another model
differs by more."""
LAST_TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2, "bf16-states": 1e-1}
"""The same for the last loss: rounding errors grow over the updates, another optimizer setting differs by more."""
LEAST_SECONDS = 5.0
"""No engine is started with less time left."""
LOG_LINES = 60
"""Maximum number of lines that are kept of the output of an engine that failed."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*MODELS, "small"], default="small", help="small: Qwen2 of the sizes below")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32", help="see peer_engines/job.py")
    parser.add_argument(
        "--recompute",
        nargs="?",
        choices=["none", "full", "auto"],
        const="full",
        default="none",
        help="recompute the blocks in every engine; auto: only in those that run out of memory without it",
    )
    parser.add_argument("--warmup", type=int, default=3, metavar="STEPS", help="untimed steps before the timed ones")
    parser.add_argument("--steps", type=int, default=10, help="number of timed steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds; medians are compared")
    parser.add_argument("--threads", type=int, help="PyTorch's threads in every engine (default: PyTorch's choice)")
    parser.add_argument(
        "--engines", default="all", help=f"engines to run, from {','.join(NEEDS)} (default: all that can run)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="set training.compile: on, and by default run only compiled peers",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of our config; VALUE is JSON"
    )
    parser.add_argument(
        "--time-limit", type=float, default=600.0, metavar="S", help="time limit of one engine's process"
    )
    parser.add_argument(
        "--total-time",
        type=float,
        metavar="S",
        help="time limit of all engines together; those with no time left are named",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="results of an earlier run with our engine, to compare peers with"
    )
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------------------------------------------------
# The run


def asked_engines(options: argparse.Namespace) -> list[str]:
    """Return the names of the requested engines, in their order.

    Raises:
        SystemExit: an unknown name.
    """
    if options.engines == "all":
        return [engine for engine in NEEDS if not options.compile or engine == OURS or "+compile" in engine]
    asked = options.engines.split(",")
    unknown = sorted(set(asked) - set(NEEDS))
    if unknown:
        sys.exit(f"--engines {','.join(unknown)}: there are {', '.join(NEEDS)}")
    return asked


def our_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of our config by dotted key: of ``--compile``, and of ``--ours``, which takes precedence."""
    given = {key: json.loads(value) for key, _, value in (text.partition("=") for text in options.ours)}
    return ({"training.compile": "on"} if options.compile else {}) | given


def architecture(options: argparse.Namespace) -> dict[str, Any]:
    """Return the Hugging Face config of the requested model."""
    if options.model in MODELS:
        return MODELS[options.model]
    heads = max(1, options.hidden // 64)
    return {
        **QWEN2,
        "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "vocab_size": options.vocab,
        "tie_word_embeddings": True,
    }


def why_not(engine: str, device: str) -> str | None:
    """Return why an engine cannot run here; None if it can."""
    missing = [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if engine == "trainer+liger" and device == "cpu":
        return "Liger's kernels need a GPU"
    return None


def make_data(job: Job) -> None:
    """Write random tokens of Zipf's law as a dataset, and the same tokens in the order in which our sampler reads
    them.
    """
    from retemper.benchmarks.peer_engines.ours import configure
    from retemper.engine.data.catalog import open_catalog
    from retemper.engine.data.loader import TrainingData
    from retemper.engine.schedule import plan_batches

    vocab_size = job.architecture["vocab_size"]
    generator = np.random.default_rng(job.seed)
    # One sample more than is read, since a window's targets extend one token beyond it.
    lengths = np.full(job.total_steps * job.batch_size + 1, job.sequence_length)
    documents = (generator.zipf(1.2, length).clip(1, vocab_size) - 1 for length in lengths)
    write_dataset(Path(job.folder) / DATASET, np.int32, lengths, documents)
    config = configure(job)
    plan = plan_batches(config.training, 1)
    catalog = open_catalog(config.data, plan, vocab_size, None, config.seed)
    data = TrainingData(catalog.train, catalog.sample_order(config.seed), plan, 0, vocab_size, False)
    first_samples = range(0, job.total_steps * job.batch_size, job.batch_size)
    batches = [data.micro_batches(first)[0].tokens.numpy() for first in first_samples]
    shape = (job.total_steps, job.batch_size, job.sequence_length)
    np.save(Path(job.folder) / BATCHES_FILE, np.stack(batches).reshape(shape))


def run_engine(engine: str, job: Job, recompute: str, time_limit: float, threads: int | None) -> dict[str, Any]:
    """Return the record of one engine, or the reason why there is none.

    ``recompute`` auto: without recomputation, and with it if memory runs out.
    """
    started = time.monotonic()
    job = dataclasses.replace(job, recompute=recompute == "full")
    record = _run_process(engine, job, time_limit, threads)
    if recompute == "auto" and _out_of_memory(record):
        left = time_limit - (time.monotonic() - started)
        if left < LEAST_SECONDS:
            return {**record, "problem": "out of memory without recomputation, and no time left to try with it"}
        return run_engine(engine, job, "full", left, threads)
    return {"engine": engine, "recompute": "full" if job.recompute else "none", **record}


def _run_process(engine: str, job: Job, time_limit: float, threads: int | None) -> dict[str, Any]:
    """Run an engine in a fresh process."""
    started = time.perf_counter()
    job_path, result = Path(job.folder) / "job.json", Path(job.folder) / "result.json"
    job.write(job_path)
    result.unlink(missing_ok=True)  # of an engine that failed after it had written one
    command = [sys.executable, __file__, "--engine", engine, "--job", str(job_path)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit, check=False, env=environment)
    except subprocess.TimeoutExpired as expired:
        lines = _text(expired.stderr).splitlines()
        return {"problem": f"not finished after {time_limit:g} s", "log": lines[-LOG_LINES:]}
    if done.returncode or not result.exists():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        problem = _problem(lines) if lines else f"exit code {done.returncode}"
        return {"problem": problem, "log": lines[-LOG_LINES:]}
    return {**json.loads(result.read_text(encoding="utf-8")), "process_seconds": time.perf_counter() - started}


def _text(output: bytes | str | None) -> str:
    """Return what a process printed before its time was over, which subprocess returns as bytes."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _problem(lines: list[str]) -> str:
    """Return the line of an engine's output that names its problem: about memory, or the last one."""
    return next((line for line in reversed(lines) if "out of memory" in line.lower()), lines[-1])[:300]


def _out_of_memory(record: dict[str, Any]) -> bool:
    return "out of memory" in record.get("problem", "").lower()


def run_here(engine: str, job: Job) -> None:
    """Run one engine in this process and write its record next to the job."""
    if engine.startswith(OURS):
        from retemper.benchmarks.peer_engines.ours import run
    elif engine.startswith("loop"):
        from retemper.benchmarks.peer_engines.plain_loop import run
    elif engine.startswith("litgpt"):
        from retemper.benchmarks.peer_engines.litgpt_step import run
    else:
        from retemper.benchmarks.peer_engines.hugging_face import run
    record = run(job, engine)
    (Path(job.folder) / "result.json").write_text(json.dumps(record), encoding="utf-8")


def compared_run(path: Path | None) -> list[dict[str, Any]]:
    """Return the first run of our engine in a file that ``--json`` wrote; nothing if it has none.

    A peer is measured all the same where ours has failed before.
    """
    if path is None or not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row["runs"][0] for row in rows if row["engine"] == OURS and "rate" in row]


def refuse_different(runs: list[dict[str, Any]], precision: str) -> None:
    """Mark the runs whose first or last loss differs from that of our first run: they have not done the same work."""
    ours = next((run for run in runs if run["engine"] == OURS and "losses" in run), None)
    for run in runs:
        if ours is None or "losses" not in run:
            continue
        first, last = (abs(run["losses"][i] - ours["losses"][i]) for i in (0, -1))
        run["first_loss_difference"], run["last_loss_difference"] = first, last
        # Written so that NaN is rejected.
        if not (first <= TOLERANCE[precision] and last <= LAST_TOLERANCE[precision]):
            run["problem"] = (
                f"rejected: losses {run['losses'][0]:.5f} .. {run['losses'][-1]:.5f}, ours {ours['losses'][0]:.5f} .. "
                f"{ours['losses'][-1]:.5f}"
            )


# --------------------------------------------------------------------------------------------------------------------
# The report


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each engine, in the order of the runs: medians over its rounds, and ratios to ours."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        row = rows.setdefault(run["engine"], {"engine": run["engine"], "runs": []})
        row["runs"].append(run)
    keys = ("tokens_per_second", "tokens_per_cpu_second", "peak_bytes", "warmup_seconds")
    for row in rows.values():
        problems = [run["problem"] for run in row["runs"] if "problem" in run]
        if problems:
            row["problem"] = problems[0]
            continue
        # Within one process the median step counts if it is known: other work on the machine slows some steps.
        for run in row["runs"]:
            run["rate"] = run.get("tokens_per_second_median", run["tokens_per_second"])
        row.update({key: statistics.median(run[key] for run in row["runs"]) for key in keys})
        row["rate"] = statistics.median(run["rate"] for run in row["runs"])
        row["spread"] = [min(run["rate"] for run in row["runs"]), max(run["rate"] for run in row["runs"])]
        row["loss"] = row["runs"][0]["losses"][0]
        row["recompute"] = row["runs"][0].get("recompute")
    ours = rows.get(OURS)
    for row in rows.values():
        if ours and "rate" in ours and "rate" in row:
            row["ours_times_as_fast"] = ours["rate"] / row["rate"]
            row["ours_memory_share"] = ours["peak_bytes"] / row["peak_bytes"]
    return list(rows.values())


def format_rows(rows: list[dict[str, Any]], missing: dict[str, str]) -> str:
    """Return the rows as a Markdown table, and then the engines that did not run, with the reason."""
    header = ["engine", "tokens/s", "spread over rounds", "tokens per CPU-s", "peak memory", "first loss"]
    header += ["recomputation", "ours: times as fast", "ours: share of memory"]
    cells, reasons = [], {}
    for row in rows:
        if "rate" not in row:
            reasons[row["engine"]] = row["problem"]
            continue
        ratios = (row.get(name) for name in ("ours_times_as_fast", "ours_memory_share"))
        low, high = row["spread"]
        cells.append(
            [
                row["engine"],
                f"{row['rate']:,.0f}",
                f"{low:,.0f} .. {high:,.0f}",
                f"{row['tokens_per_cpu_second']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                f"{row['loss']:.4f}",
                row["recompute"] or "",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    reasons |= {engine: f"not run: {reason}" for engine, reason in missing.items()}
    return "\n".join([*table(header, cells), *(f"{engine}: {reason}" for engine, reason in reasons.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all engines and print the table; return 0 if no runnable engine has failed or was rejected."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    if options.engine:
        run_here(options.engine, Job.read(options.job))
        return 0
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    asked = asked_engines(options)
    if min(options.warmup, options.steps, options.rounds) < 1:
        sys.exit("--warmup, --steps and --rounds are at least 1: the first step compiles and allocates")
    if options.compare and OURS in asked:
        sys.exit(f"--compare {options.compare}: is for peers alone; remove {OURS} from --engines")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        require_report("--json", options.json)
    missing = {engine: reason for engine in asked if (reason := why_not(engine, device))}
    engines = [engine for engine in asked if engine not in missing]
    report = BenchmarkReport(command_line("benchmarks/peers.py", arguments), describe_torch(), {"missing": missing})
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        job = job_of(options, folder, device)
        make_data(job)
        threads = options.threads or torch.get_num_threads()
        report.settings |= {"job": {**vars(job), "folder": None}, "threads": threads, "recompute": options.recompute}
        run_engines(engines, job, options, report, started)
    print(format_rows(report.rows, missing))
    return 1 if any("rate" not in row for row in report.rows) else 0


def job_of(options: argparse.Namespace, folder: str, device: str) -> Job:
    """Return the job that the command line describes."""
    return Job(
        folder=folder,
        architecture=architecture(options),
        batch_size=options.batch,
        sequence_length=options.sequence,
        warmup_steps=options.warmup,
        steps=options.steps,
        device=device,
        precision=options.precision,
        ours=our_settings(options),
    )


def run_engines(
    engines: Sequence[str], job: Job, options: argparse.Namespace, report: BenchmarkReport, started: float
) -> None:
    """Run the engines one after another; write the report after each, so that an interrupted run keeps them."""
    runs: list[dict[str, Any]] = []
    others = compared_run(options.compare)

    def write() -> None:
        refuse_different([*others, *runs], options.precision)
        rows = summarize([*others, *runs])
        report.rows = rows[len(others) :]
        report.write(options.json)

    write()
    for round_number in range(options.rounds):
        for engine in engines:
            left = math.inf if options.total_time is None else options.total_time - (time.monotonic() - started)
            if left < LEAST_SECONDS and round_number:
                continue
            if left < LEAST_SECONDS:
                runs.append({"engine": engine, "problem": "not run: no time left"})
            else:
                limit = min(options.time_limit, left)
                runs.append(run_engine(engine, job, options.recompute, limit, options.threads))
            last = runs[-1]
            rate = last.get("problem") or f"{last['tokens_per_second']:,.0f} tokens/s"
            print(f"{engine}: {rate}", file=sys.stderr, flush=True)
            write()


if __name__ == "__main__":
    run_command(main)
