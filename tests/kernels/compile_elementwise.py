"""Compiles the elementwise Triton kernels for an H100 (sm_90), which needs no GPU. Prints the kernels' names.

A program of its own: Triton interprets or compiles for a whole process.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from retemper.kernels import elementwise_triton as kernels

CONSTANTS = {
    kernels._rms_norm_kernel: {"HAS_RESIDUAL": True, "BLOCK_ROWS": 2, "BLOCK_H": 128},
    kernels._rms_norm_backward_kernel: {
        "HAS_GRAD_TOTAL": True,
        "WEIGHT_GRAD": True,
        "TILES": 3,
        "BLOCK_ROWS": 2,
        "BLOCK_H": 128,
    },
    kernels._rope_kernel: {"INVERSE": True, "BLOCK_N": 2, "BLOCK_D": 32},
    kernels._swiglu_kernel: {"BLOCK": 128},
    kernels._swiglu_backward_kernel: {"BLOCK": 128},
}
FP32 = ("cos_ptr", "sin_ptr", "inverse_rms_ptr", "partial_ptr", "eps")


def type_of(name: str, constants: dict) -> str:
    """Triton's name of an argument's type, for bf16 tensors."""
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32" if name in FP32 else "*bf16"
    return "fp32" if name in FP32 else "i32"


for kernel, constants in CONSTANTS.items():
    signature = {parameter.name: type_of(parameter.name, constants) for parameter in kernel.params}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    print(kernel.__name__)
