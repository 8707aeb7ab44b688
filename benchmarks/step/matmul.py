"""Measure the rate of matrix products on this machine: a practical peak for a training step."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
_WARMUP = 2
_LEAST, _MOST = 3, 200  # limits of the number of timed products


@dataclass(frozen=True)
class MatmulRate:
    """A product of two random square matrices."""

    dtype: str
    size: int
    """Number of rows and columns."""
    flops_per_second: float
    """``2 size^3`` over the median time."""


def matmul_rates(
    device: torch.device, dtypes: dict[str, torch.dtype], seconds: float, sizes: Sequence[int] = ()
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
            median = _median_seconds(lambda a=left, b=right, c=product: torch.mm(a, b, out=c), device, seconds)  # type: ignore[misc]
            rates.append(MatmulRate(name, size, 2 * size**3 / median))
    return rates


def _median_seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    for _ in range(_WARMUP):
        run()
    count = min(_MOST, max(_LEAST, int(seconds / max(1e-7, _time(run, 1, device)[0]))))
    return statistics.median(_time(run, count, device))


def _time(run: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each of ``count`` runs."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            run()
            moments.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
