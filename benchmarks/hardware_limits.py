"""Measure two practical limits of a device: the rate of large matrix products, and of large copies.

    python benchmarks/hardware_limits.py

Changes no setting of a GPU. With clocks and power of NVIDIA GPUs, read at the end of the load.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from retemper.benchmarks.machine import describe_torch, one_line
from retemper.benchmarks.report import BenchmarkReport, command_line
from retemper.benchmarks.timing import time_for
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.engine.files.outputs import require_report

SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
COPY_BYTES = {"cuda": 2**32, "cpu": 2**26}
MOST_CALLS = 300
"""Products of one size: enough for a steady clock of a GPU, where one takes about a millisecond."""
_QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv"]


@dataclass(frozen=True)
class MatmulRate:
    """A product of two random square matrices."""

    dtype: str
    size: int
    """Number of rows and columns."""
    flops_per_second: float
    """``2 size^3`` over the median time."""


def matmul_rates(
    device: torch.device, dtypes: Mapping[str, torch.dtype], seconds: float, sizes: Sequence[int] = ()
) -> list[MatmulRate]:
    """Time products of every size and dtype for about ``seconds`` each.

    Random numbers, never zeros: with zeros a GPU uses less power and runs faster. The precision of fp32 products is
    that of ``torch.get_float32_matmul_precision()``.
    """
    rates = []
    for name, dtype in dtypes.items():
        for size in sizes or SIZES[device.type]:
            left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            product = torch.empty(size, size, device=device, dtype=dtype)
            call = functools.partial(torch.mm, left, right, out=product)
            times = time_for(call, device, seconds, most=MOST_CALLS)
            rates.append(MatmulRate(name, size, 2 * size**3 / statistics.median(times)))
    return rates


def copy_rate(device: torch.device, seconds: float) -> float:
    """Return the bytes per second, read and written, of a copy that no cache holds."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(time_for(lambda: target.copy_(source), device, seconds))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of this command."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each of them (default: %(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command line of this process."""
    options = parse_arguments()
    if options.json is not None:
        require_report("--json", options.json)
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, machine = torch.device(name), describe_torch()
    print(one_line(machine))
    report = BenchmarkReport(command_line("benchmarks/hardware_limits.py"), machine, {"seconds": options.seconds})
    for rate in matmul_rates(device, {"bf16": torch.bfloat16}, options.seconds):
        print(f"{rate.dtype} matrix product {rate.size}^3, random: {rate.flops_per_second / 1e12:.3g} TFLOP/s")
        report.rows.append(asdict(rate))
    report.summary["copy_bytes_per_second"] = copy_rate(device, options.seconds)
    print(f"copy, read + written: {report.summary['copy_bytes_per_second'] / 1e12:.3g} TB/s")
    with suppress(OSError):
        print(subprocess.run(_QUERY, capture_output=True, text=True, check=False).stdout)
    report.write(options.json)


if __name__ == "__main__":
    run_command(main)
