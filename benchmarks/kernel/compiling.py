"""Compile Triton kernels for a GPU that need not exist, and count what the machine code needs and does."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ...kernels.linear_cross_entropy.variants import KernelVariant

SHARED_KB_PER_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}
"""Shared memory of a multiprocessor by compute capability (CUDA C++ Programming Guide, technical specifications)."""
REGISTERS_PER_SM = 65536
WARPS_PER_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}
RESERVED_SHARED_KB = 1
"""Shared memory that CUDA takes for each CTA."""
MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA")
"""Matrix products of Hopper (wgmma), of Ampere and Ada, and of Blackwell."""


@dataclass(frozen=True)
class CompiledKernel:
    """The resources and instructions of a compiled kernel."""

    name: str
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread: registers that were spilled to memory."""
    shared_bytes: int
    num_warps: int
    ctas_per_sm: int
    """CTAs (programs) that fit on a multiprocessor at the same time."""
    instructions: dict[str, int]
    """Number in the machine code by mnemonic."""
    pending_products: int
    """Groups of asynchronous matrix products that may run while the loop goes on: 0 if each is waited for."""
    compile_seconds: float

    def count(self, *mnemonics: str) -> int:
        """Return the number of these instructions."""
        return sum(self.instructions.get(mnemonic, 0) for mnemonic in mnemonics)


def compile_kernel(variant: KernelVariant, capability: int) -> CompiledKernel:
    """Compile a variant.

    Args:
        variant: the kernel, with arguments.
        capability: compute capability times ten.
    """
    started = time.perf_counter()
    compiled = _compile(variant.kernel, variant.arguments, GPUTarget("cuda", capability, 32))
    seconds = time.perf_counter() - started
    registers, stack = _resources(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    waits = [int(number) for number in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", compiled.asm["ptx"])]
    return CompiledKernel(
        variant.name,
        registers,
        stack,
        shared,
        warps,
        ctas_per_sm(registers, shared, warps, capability),
        dict(_instructions(compiled.asm["cubin"])),
        max(waits, default=0),
        seconds,
    )


def ctas_per_sm(registers: int, shared_bytes: int, num_warps: int, capability: int) -> int:
    """Return how many CTAs fit on a multiprocessor; registers are allocated to warps in units of 256."""
    registers_per_warp = -(-32 * registers // 256) * 256
    by_registers = REGISTERS_PER_SM // (registers_per_warp * num_warps)
    by_shared = SHARED_KB_PER_SM[capability] * 1024 // (shared_bytes + RESERVED_SHARED_KB * 1024)
    return min(by_registers, by_shared, WARPS_PER_SM[capability] // num_warps, 32)


def _compile(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel as Triton's launcher does for these arguments."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack per thread."""
    usage = _run_on(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def _instructions(cubin: bytes) -> Counter[str]:
    code = _run_on(cubin, triton.knobs.nvidia.nvdisasm.path, "-c")
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE))


def _run_on(cubin: bytes, program: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([program, *options, str(path)], capture_output=True, text=True, check=True).stdout
