"""Compile all Triton kernels for a GPU on this machine, and print what their machine code needs and does.

    python benchmarks/compiled_kernels.py
    python benchmarks/compiled_kernels.py --kernels persistent "target products" --json compiled.json

No GPU is needed: the compiler and the disassembler are part of Triton's package. Nothing is read from Triton's cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from retemper.benchmarks.machine import describe_machine
from retemper.benchmarks.report import BenchmarkReport, command_line, table
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import require_report

if TYPE_CHECKING:
    from retemper.benchmarks.kernel.compiling import CompiledKernel

CAPABILITIES = (80, 86, 89, 90, 100, 103, 120)
RESOURCES = ("registers", "stack", "shared", "CTAs/SM", "pending")
INSTRUCTIONS = ("UTMALDG", "LDGSTS", "UTMASTG", "STG", "MUFU")
"""Counted instructions: loads and stores by descriptor (TMA), asynchronous loads by pointer, stores by pointer,
exponentials and other special functions."""


def compile_all(capability: int, texts: Sequence[str]) -> list[CompiledKernel]:
    """Compile the variants whose names contain one of ``texts``."""
    from retemper.benchmarks.kernel.compiling import compile_kernel
    from retemper.kernels.linear_cross_entropy.variants import kernel_variants

    variants = kernel_variants(divmod(capability, 10))
    return [compile_kernel(one, capability) for one in variants if any(text in one.name for text in texts)]


def format_compiled(kernels: Sequence[CompiledKernel]) -> str:
    """Return a Markdown table."""
    from retemper.benchmarks.kernel.compiling import MATRIX_INSTRUCTIONS

    rows = []
    for kernel in kernels:
        numbers = [kernel.registers, kernel.stack_bytes, kernel.shared_bytes, kernel.ctas_per_sm]
        numbers += [kernel.pending_products, kernel.count(*MATRIX_INSTRUCTIONS)]
        numbers += [kernel.count(name) for name in INSTRUCTIONS]
        numbers.append(sum(kernel.instructions.values()))
        rows.append([kernel.name, *(f"{number:,}" for number in numbers), f"{kernel.compile_seconds:.1f}"])
    return "\n".join(table(["kernel", *RESOURCES, "products", *INSTRUCTIONS, "all", "seconds"], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--capability", type=int, choices=CAPABILITIES, default=90, help="compute capability times ten (default: 90)"
    )
    parser.add_argument(
        "--kernels", nargs="+", default=[""], metavar="TEXT", help="only kernels whose name contains one of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts")
    options = parser.parse_args(arguments)
    if options.json is not None:
        require_report("--json", options.json)
    report = BenchmarkReport(
        command_line("benchmarks/compiled_kernels.py", arguments),
        describe_machine(),
        {"capability": options.capability, "kernels": options.kernels},
    )
    # Triton reads both when it is imported. The interpreter would replace the kernels by Python functions.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        kernels = compile_all(options.capability, options.kernels)
    if not kernels:
        raise UserError(f"--kernels {' '.join(options.kernels)}: no name contains this; without it all are compiled")
    print(format_compiled(kernels))
    report.rows = [asdict(kernel) for kernel in kernels]
    report.write(options.json)


if __name__ == "__main__":
    run_command(main)
