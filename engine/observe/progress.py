"""Measure throughput and memory, and format numbers for people."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from ..parallel.process_group import Ranks
from ..system import peak_memory
from .flops import device_peak_flops
from .observer import StepRecord


class Stopwatch:
    """Measures the time in training steps, without evaluation and saving."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start from zero."""
        self._since, self._steps, self._profiled = time.perf_counter(), 0, False

    def step_done(self, profiled: bool = False) -> None:
        """Count one step; ``profiled``: its time says nothing about others."""
        self._steps += 1
        self._profiled |= profiled

    def take_steps(self) -> tuple[int, bool]:
        """Return the number of steps since the last call, and whether any of them was profiled."""
        steps, profiled = max(1, self._steps), self._profiled
        self._steps, self._profiled = 0, False
        return steps, profiled

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside. A lap may end inside; what follows it is excluded."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - max(started, self._since)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated by PyTorch on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def speed(seconds: float, tokens: int, flops_per_token: float, ranks: Ranks) -> dict[str, float]:
    """Return the values of a record about speed and memory.

    Args:
        seconds: mean time of a step.
        tokens: of a step, over all ranks.
        flops_per_token: of the model.
        ranks: all ranks.
    """
    rate = tokens / seconds
    values = {
        "tokens_per_second": rate,
        "tokens_per_second_per_rank": rate / ranks.world_size,
        "step_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(ranks.device),
    }
    peak = device_peak_flops(ranks.device)
    if peak is not None:
        values["mfu"] = rate / ranks.world_size * flops_per_token / peak
    return values


def human(number: float) -> str:
    """Format 1234567 as '1.23M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Format 3725 as '1:02:05'."""
    return str(timedelta(seconds=round(seconds)))


def live_text(record: StepRecord) -> str:
    """Return the numbers of a step for the live line. A narrow terminal shows the first of them."""
    step, values = record.progress.step, record.values
    num_steps = step + record.remaining_steps
    loss = "no targets" if values["loss"] is None else f"loss {values['loss']:.4f}"
    mfu = f" | MFU {values['mfu']:.1%}" if "mfu" in values else ""
    eta = duration(record.seconds_left)
    rate = f"{values['tokens_per_second']:,.0f} tokens/s"
    return f"step {step:,}/{num_steps:,}{_epoch(values)} | {loss} | ETA {eta} | {rate}{mfu}"


def _epoch(values: Mapping[str, Any]) -> str:
    return f" | epoch {values['epoch']:.2f}" if "epoch" in values else ""


def step_line(step: int, remaining_steps: int, tokens: int, values: Mapping[str, Any], seconds_left: float) -> str:
    """Return the console line of a step with the recorded ``values``."""
    num_steps = step + remaining_steps
    loss = "no targets" if values["loss"] is None else f"loss {values['loss']:.4f}"
    norm = "" if values["grad_norm"] is None else f" | grad norm {values['grad_norm']:.3f}"
    return (
        f"step {step:>{len(str(num_steps))}}/{num_steps}"
        f" | tokens {human(tokens)}{_epoch(values)} | {loss} | lr {values['learning_rate']:.2e}{norm}"
        f" | {values['tokens_per_second']:,.0f} tokens/s, {values['tokens_per_second_per_rank']:,.0f} per rank"
        + (f" | MFU {values['mfu']:.1%}" if "mfu" in values else "")
        + f" | {values['peak_memory_bytes'] / 2**30:.2f} GiB | ETA {duration(seconds_left)}"
    )
