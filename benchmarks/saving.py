"""Measure how long a training step waits for a checkpoint, and whether memory stays constant over many of them.

    python benchmarks/saving.py --gigabytes 4 --saves 50 --folder /tmp/saving

One process, one rank, tensors on the GPU if there is one. A step is a given duration of matrix products, followed by
an update; no model is involved, so that any size of checkpoint can be measured with any duration of a step. The stall
is the time that a step waits for the checkpoint begun before it: in ``Saver.save`` and before its update. For
comparison, a copy of the same bytes is timed in the same run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from retemper.benchmarks.machine import describe_torch
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.benchmarks.timing import held_bytes, time_calls
from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.settings import CheckpointConfig
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import require_report
from retemper.engine.parallel.process_group import process_group
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.checkpoint.manifest import Manifest
from retemper.engine.weights.checkpoint.saver import Saver
from retemper.engine.weights.checkpoint.staging import Staging
from retemper.engine.weights.checkpoint.store import CheckpointStore

CPU = torch.device("cpu")


def measure(report: BenchmarkReport, folder: Path) -> None:
    """Save the tensors of ``report.settings`` into ``folder``, which is removed afterwards; fill in the report."""
    settings = report.settings
    with process_group("auto", 600) as ranks:
        count = max(1, round(settings["gigabytes"] * 1e9 / (4 * 1024 * 16384)))
        tensors = {f"weight.{n}": torch.randn(1024, 16384, device=ranks.device) for n in range(count)}
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        store = CheckpointStore(folder, ranks, keep_last=1, keep_best=False)
        checkpoint = CheckpointConfig(asynchronous=settings["asynchronous"])
        with Saver(store, ranks, checkpoint, lambda line: None) as saver:
            for step in tqdm(range(1, settings["saves"] + 1), desc="saves", disable=None):
                report.rows.append(_save(saver, tensors, step, settings["step_seconds"], ranks.device))
        staging = Staging()

        def stage() -> None:
            staging.begin(tensors)
            staging.copy()

        stage()  # allocates
        copies = time_calls(stage, 3, CPU)
        shutil.rmtree(folder)
    stalls = [row["stall_seconds"] for row in report.rows]
    resident = [row["resident_bytes"] / 1e9 for row in report.rows]
    report.summary = {
        "gigabytes": round(size, 3),
        "stall_seconds_per_gb_first": round(stalls[0] / size, 4),
        "stall_seconds_per_gb_median_later": round(statistics.median(stalls[1:] or stalls) / size, 4),
        "copy_seconds_per_gb": round(min(copies) / size, 4),
        "whole_save_gb_per_second": round(size / statistics.median(row["seconds"] for row in report.rows), 3),
        "resident_gb_after_first_save": round(resident[0], 3),
        "resident_gb_after_last_save": round(resident[-1], 3),
    }


def _save(
    saver: Saver, tensors: dict[str, torch.Tensor], step: int, step_seconds: float, device: torch.device
) -> dict[str, Any]:
    """Save once behind one step."""
    began = time.perf_counter()
    saver.save(tensors, HfAssets({}), Manifest(kind="training", step=step), None)
    stall = time.perf_counter() - began
    _compute(device, step_seconds)
    before = time.perf_counter()
    saver.hold_update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    stall += time.perf_counter() - before
    saver.wait(raise_on_failure=True)
    return {"stall_seconds": stall, "seconds": time.perf_counter() - began, "resident_bytes": held_bytes(CPU)}


def _compute(device: torch.device, seconds: float) -> None:
    """Keep the device busy with matrix products for ``seconds``."""
    matrix, began = torch.randn(1024, 1024, device=device), time.perf_counter()
    while time.perf_counter() - began < seconds:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Run the command line of this process."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the tensors (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=50, help="number of saves (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=1.0, help="duration of a step (default: %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write to; it must not exist")
    parser.add_argument("--synchronous", action="store_true", help="for comparison: wait for the disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    options = parser.parse_args()
    if os.path.lexists(options.folder):
        raise UserError(f"--folder {options.folder}: exists already; choose another")
    if options.json is not None:
        require_report("--json", options.json)
    settings = {name: getattr(options, name) for name in ("gigabytes", "saves", "step_seconds")}
    settings["asynchronous"] = not options.synchronous
    report = BenchmarkReport(command_line("benchmarks/saving.py"), describe_torch(), settings)
    measure(report, options.folder)
    print("\n".join(table(["", "found"], [[name, f"{value}"] for name, value in report.summary.items()])))
    report.write(options.json)


if __name__ == "__main__":
    run_command(main)
