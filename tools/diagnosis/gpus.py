"""Check the GPUs, the CUDA build of PyTorch, NCCL, and the packages with GPU kernels."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

from .finding import Finding, note, ok, problem

GROUP = "GPUs"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_GIB = 2**30


def check_gpus() -> list[Finding]:
    """Return findings on the GPUs of this process."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        return [problem(GROUP, "torch", f"cannot be imported: {reason}", "install it again: https://pytorch.org")]
    build = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        return [_no_gpu(torch.__version__, build, driver_version() or shutil.which("nvidia-smi"))]
    findings = [ok(GROUP, "torch", f"built for {'ROCm' if torch.version.hip else 'CUDA'} {build}")]
    if driver := driver_version():
        findings.append(ok(GROUP, "driver", driver))
    findings += [_gpu(number) for number in range(torch.cuda.device_count())]
    return [*findings, _nccl(), *_kernels()]


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if it is not loaded."""
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else None


def _no_gpu(torch_version: str, build: str | None, driver: str | None) -> Finding:
    if build is None and driver:
        remedy = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        return problem(GROUP, "torch", f"{torch_version} is a CPU build, but this machine has an NVIDIA driver", remedy)
    if build is not None and driver:
        remedy = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that the driver is new enough for that version"
        return problem(GROUP, "torch", f"is built for CUDA {build}, but sees no GPU (driver {driver})", remedy)
    if build is not None:
        return note(
            GROUP, "torch", f"is built for CUDA {build}, but this machine has no NVIDIA driver; runs use the CPU"
        )
    return ok(GROUP, "gpu", "none; runs use the CPU")


def _gpu(number: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(number)
    name, capability = f"gpu {number}", f"{facts.major}.{facts.minor}"
    try:
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        return problem(GROUP, name, f"{facts.name} cannot be used: {reason}", "see `nvidia-smi`; reset or exclude it")
    text = f"{facts.name}, compute capability {capability}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < 0.9 * total:
        return note(GROUP, name, text, "another process uses it; see `nvidia-smi`")
    if torch.version.cuda and facts.major < 8:
        return note(GROUP, name, f"{text}; it has no bf16", "set training.precision to fp16 or fp32")
    return ok(GROUP, name, text)


def _nccl() -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        return problem(GROUP, "nccl", "PyTorch is built without NCCL", "install a build of PyTorch with it")
    return ok(GROUP, "nccl", ".".join(map(str, torch.cuda.nccl.version())))


def _kernels() -> list[Finding]:
    """Return findings on the attention backend that a usual model would get, and on packages with kernels."""
    import torch

    from ...kernels.attention.choice import choose_attention_backend, import_problem
    from ...kernels.triton_support import triton_refusal

    findings = []
    try:
        choice = choose_attention_backend("auto", torch.device("cuda"), torch.bfloat16, 128)
        findings.append(ok(GROUP, "attention", choice.reason))
    except (ValueError, RuntimeError) as error:  # its check of the kernels runs them
        findings.append(problem(GROUP, "attention", " ".join(str(error).split())[:200], "see `nvidia-smi`"))
    if importlib.util.find_spec("flash_attn") is not None:
        broken = import_problem("flash_attn", "flash_attn_varlen_func")
        remedy = "install a build for this PyTorch, or remove the package"
        findings.append(
            note(GROUP, "flash-attn", broken, remedy) if broken else ok(GROUP, "flash-attn", "can be imported")
        )
    refusal = triton_refusal("cuda")
    findings.append(ok(GROUP, "triton", "installed") if refusal is None else problem(GROUP, "triton", refusal, ""))
    return findings
