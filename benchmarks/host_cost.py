"""Count what the host does in a training step: Python calls, operators and CPU time, ours next to the Trainer's.

    pip install --no-deps accelerate
    python benchmarks/host_cost.py
    python benchmarks/host_cost.py --precision fp32 --json host.json

Both train the same tiny model, so that a step is almost only host time; counts hardly depend on its width. The same
steps are not counted twice, because counting slows them: some are timed, the next ones count calls, the last ones
operators. "copied" is what operators read and write that only copy or cast.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from retemper.benchmarks.machine import describe_torch
from retemper.benchmarks.peer_engines.job import Job
from retemper.benchmarks.peers import QWEN2, make_data
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command

ENGINES = {"retemper": "ours", "trainer": "hugging_face"}
"""Module in benchmarks/peer_engines of each engine."""
WARMUP = 3
STEPS = {"timed": 5, "calls": 2, "operators": 2}
"""Number of steps for each measurement, in this order."""
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
COPIES = {
    *("aten::_to_copy", "aten::copy_", "aten::clone", "aten::cat", "aten::div.Tensor", "aten::_foreach_copy_"),
    *("fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy", "fsdp::chunk_cat"),
}
"""Operators that only copy or cast, with or without their overload. FSDP divides by one."""


class OperatorCounter(TorchDispatchMode):
    """Counts operators while it is active, and the bytes that those in :data:`COPIES` read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.copied_bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor arrives as operators on its parts.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = operator(*args, **(kwargs or {}))
        name = operator.name()
        self.operators[name] += 1
        if name in COPIES or name.partition(".")[0] in COPIES:
            # An in-place operator returns what it writes, one with outputs gets it as an argument.
            read_or_written = {id(x): x for x in tree_iter((args, kwargs, result)) if isinstance(x, Tensor)}
            self.copied_bytes += sum(x.numel() * x.element_size() for x in read_or_written.values())
        return result


class CountingClock:
    """Takes the place of the engines' clock, and measures the steps of :data:`STEPS` in turn."""

    def __init__(self, job: Job):
        self._done = 0
        self._calls = 0
        self._counter = OperatorCounter()
        self._figures: dict[str, float] = {}

    def ready(self) -> None:
        """Do nothing: the first steps are not measured."""

    def step_done(self, loss: Tensor | float) -> None:
        """End the measurement that ends with this step, and begin the next."""
        self._done += 1
        at = WARMUP
        for name, count in STEPS.items():
            if self._done == at:
                getattr(self, f"_begin_{name}")()
            at += count
            if self._done == at:
                self._figures |= {key: value / count for key, value in getattr(self, f"_end_{name}")().items()}

    def record(self) -> dict[str, Any]:
        """Return the figures of one step."""
        return self._figures

    def _begin_timed(self) -> None:
        self._seconds = _cpu_seconds()

    def _end_timed(self) -> dict[str, float]:
        return {"cpu_seconds": _cpu_seconds() - self._seconds}

    def _begin_calls(self) -> None:
        sys.setprofile(self._count)

    def _end_calls(self) -> dict[str, float]:
        sys.setprofile(None)
        return {"calls": self._calls}

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self._calls += 1

    def _begin_operators(self) -> None:
        self._counter.__enter__()

    def _end_operators(self) -> dict[str, float]:
        self._counter.__exit__(None, None, None)
        return {"operators": self._counter.operators.total(), "copied_bytes": self._counter.copied_bytes}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_here(engine: str, job: Job) -> None:
    """Run one engine in this process, and print its figures as the last line."""
    module = importlib.import_module(f"retemper.benchmarks.peer_engines.{ENGINES[engine]}")
    module.Clock = CountingClock  # type: ignore[attr-defined]
    print(json.dumps(module.run(job, engine)))


def run_engine(engine: str, job_path: Path) -> dict[str, Any]:
    """Return the figures of one engine in a fresh process, or the reason why there are none."""
    command = [sys.executable, __file__, "--engine", engine, "--job", str(job_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"engine": engine, "problem": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return {"engine": engine, **json.loads(done.stdout.splitlines()[-1])}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a step, one sequence (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "bf16-states"], default="bf16", help="see job.py")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the lowest CPU time counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def best_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each engine: counts, and the lowest CPU time of all rounds."""
    rows: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run.get("cpu_seconds", 0.0)):
        rows.setdefault(run["engine"], run)
    return [rows[engine] for engine in ENGINES]


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a table whose last line has ours over the Trainer's."""
    keys = ("calls", "operators", "cpu_seconds", "copied_bytes")
    problems = [f"{row['engine']}: {row['problem']}" for row in rows if "problem" in row]
    cells = [
        [
            row["engine"],
            f"{row['calls']:,.0f}",
            f"{row['operators']:,.0f}",
            f"{row['cpu_seconds'] * 1e3:.1f} ms",
            f"{row['copied_bytes'] / 1e6:.2f} MB",
        ]
        for row in rows
        if "problem" not in row
    ]
    if not problems:
        ours, trainer = rows
        cells.append(["ours / Trainer", *(f"{ours[key] / max(trainer[key], 1e-9):.2f}" for key in keys)])
    return "\n".join([*table(["one step", "Python calls", "operators", "CPU time", "copied"], cells), *problems])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both engines and print the table; return 0 if both ran."""
    options = parse_arguments(arguments)
    if options.engine:
        run_here(options.engine, Job.read(options.job))
        return 0
    report = BenchmarkReport(command_line("benchmarks/host_cost.py", arguments), describe_torch(), vars(options))
    with tempfile.TemporaryDirectory(prefix="host-cost-") as folder:
        architecture = {**QWEN2, **SHAPE, "num_hidden_layers": options.layers, "vocab_size": 1024}
        job = Job(
            folder=folder,
            architecture={**architecture, "tie_word_embeddings": True},
            batch_size=1,
            sequence_length=options.tokens,
            warmup_steps=WARMUP,
            steps=sum(STEPS.values()),
            device="cpu",
            precision=options.precision,
        )
        job_path = Path(folder) / "job.json"
        job.write(job_path)
        make_data(job)
        runs = [run_engine(engine, job_path) for _ in range(options.rounds) for engine in ENGINES]
    report.settings["json"] = report.settings["job"] = None
    report.rows = best_of(runs)
    report.write(options.json)
    print(format_rows(report.rows))
    return 1 if any("problem" in row for row in report.rows) else 0


if __name__ == "__main__":
    run_command(main)
