"""Measure how long a training step waits for a checkpoint, and whether memory stays constant over many of them.

    python benchmarks/saving.py --gigabytes 4 --saves 50 --folder /tmp/saving

One process, one rank, tensors on the GPU if there is one. A step is a given duration of
matrix products, followed by an update. The stall is the time that a step waits for the checkpoint begun before it: in
``Saver.save`` and before its update. For comparison, a copy of the same bytes is timed in the same run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.settings import CheckpointConfig
from retemper.engine.errors import UserError, run_command
from retemper.engine.parallel.process_group import process_group
from retemper.engine.weights.checkpoint.assets import HfAssets
from retemper.engine.weights.checkpoint.manifest import Manifest
from retemper.engine.weights.checkpoint.saver import Saver
from retemper.engine.weights.checkpoint.staging import Staging
from retemper.engine.weights.checkpoint.store import CheckpointStore


def measure(gigabytes: float, saves: int, folder: Path, asynchronous: bool, step_seconds: float) -> dict[str, object]:
    """Save ``gigabytes`` GB of tensors ``saves`` times into ``folder``, which is removed afterwards."""
    with process_group("auto", 600) as ranks:
        count = max(1, round(gigabytes * 1e9 / (4 * 1024 * 16384)))
        tensors = {f"weight.{n}": torch.randn(1024, 16384, device=ranks.device) for n in range(count)}
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        process, stalls, memory, seconds = psutil.Process(), [], [], []
        store = CheckpointStore(folder, ranks, keep_last=1, keep_best=False)
        with Saver(store, ranks, CheckpointConfig(asynchronous=asynchronous), lambda line: None) as saver:
            for step in tqdm(range(1, saves + 1), desc="saves", disable=None):
                began = time.perf_counter()
                saver.save(tensors, HfAssets({}), Manifest(kind="training", step=step), None)
                stall = time.perf_counter() - began
                _compute(ranks.device, step_seconds)
                before = time.perf_counter()
                saver.hold_update()
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                stalls.append(stall + time.perf_counter() - before)
                saver.wait(required=True)
                seconds.append(time.perf_counter() - began)
                memory.append(process.memory_info().rss)
        staging, copies = Staging(), []
        for _ in range(4):
            began = time.perf_counter()
            staging.begin(tensors)
            staging.copy()
            copies.append(time.perf_counter() - began)
        shutil.rmtree(folder)
        return {
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "asynchronous": asynchronous,
            "gigabytes": round(size, 3),
            "saves": saves,
            "step_seconds": step_seconds,
            "stall_seconds_per_gb_first": round(stalls[0] / size, 4),
            "stall_seconds_per_gb_median_later": round(statistics.median(stalls[1:] or stalls) / size, 4),
            "copy_seconds_per_gb": round(min(copies[1:]) / size, 4),
            "whole_save_gb_per_second": round(size / statistics.median(seconds), 3),
            "resident_gb_after_save": {n: round(memory[n - 1] / 1e9, 3) for n in (1, 2, saves // 2, saves) if n},
        }


def _compute(device: torch.device, seconds: float) -> None:
    """Keep the device busy with matrix products for ``seconds``."""
    matrix, began = torch.randn(1024, 1024, device=device), time.perf_counter()
    while time.perf_counter() - began < seconds:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the tensors (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=50, help="number of saves (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=1.0, help="duration of a step (default: %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write to; it must not exist")
    parser.add_argument("--synchronous", action="store_true", help="for comparison: wait for the disk")
    options = parser.parse_args()
    if os.path.lexists(options.folder):
        raise UserError(f"--folder {options.folder}: exists already; choose another")
    asynchronous = not options.synchronous
    result = measure(options.gigabytes, options.saves, options.folder, asynchronous, options.step_seconds)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_command(main)
