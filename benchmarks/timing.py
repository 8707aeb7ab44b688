"""Time repeated calls, and measure peak memory: by events and the allocator on a GPU, by the clock and Linux on a CPU.

triton.testing.do_bench and torch.utils.benchmark are not used: neither restores overwritten inputs between calls, and
the first needs a GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..engine.system import peak_memory

Call = Callable[[], object]


def now(device: torch.device) -> Any:
    """Return a moment. On a GPU it is an event on the current stream, so that the host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Return the seconds between two moments of :func:`now`; a GPU must have reached both."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def time_calls(call: Call, count: int, device: torch.device, prepare: Call | None = None) -> list[float]:
    """Return the seconds of each of ``count`` calls; ``prepare`` runs before each of them and is not timed."""
    moments = []
    for _ in range(count):
        if prepare is not None:
            prepare()
        begin = now(device)
        call()
        moments.append((begin, now(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [seconds_between(begin, end) for begin, end in moments]


def time_for(
    call: Call, device: torch.device, seconds: float, least: int = 3, most: int = 200, prepare: Call | None = None
) -> list[float]:
    """Return the seconds of each of as many calls as take about ``seconds``, after two that are not counted."""
    one = statistics.median(time_calls(call, 2, device, prepare))
    return time_calls(call, min(most, max(least, int(seconds / max(one, 1e-6)))), device, prepare)


def held_bytes(device: torch.device) -> int:
    """Return the bytes that tensors hold on a GPU, or the resident memory of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def reset_peak(device: torch.device) -> bool:
    """Begin a new peak; return False if Linux does not allow it, so that the peak is that of the whole process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes since :func:`reset_peak`, of the kind that :func:`held_bytes` returns."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # macOS, where a process knows only its peak
        return peak_memory()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
