"""Profile some steps with PyTorch's profiler: a table of operators by device time, and a trace of every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from .options import TABLE_FILE, TRACE_FILE

WARMUP_STEPS = 1
"""Steps that are traced and then discarded, because the first one waits for the profiler's own start."""
PROFILED_STEPS = 3
"""Steps in the table and in the trace."""
_ROWS = 60


@contextmanager
def profiled_steps(folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Write a table and a trace of the steps in this context to ``folder``, which is made.

    Yields:
        A function to call after each of the ``WARMUP_STEPS + PROFILED_STEPS`` steps.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: profile) -> None:
        text = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=100)
        (folder / TABLE_FILE).write_text(f"{PROFILED_STEPS} steps\n{text}\n", encoding="utf-8")
        profiler.export_chrome_trace(str(folder / TRACE_FILE))

    steps = schedule(wait=0, warmup=WARMUP_STEPS, active=PROFILED_STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
