"""Profile some steps of a run with PyTorch's profiler: every rank writes a trace and a table of its operators.

Ranks do not wait for each other here. Stacks, shapes and memory are not recorded, because they slow the steps down and
change what is measured.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..files.atomic import replace_file
from ..parallel.launcher import read_launcher
from ..parallel.process_group import Ranks
from .waiting import Say

PROFILE_FOLDER = "profile"
_STEP = "ProfilerStep#"
"""Name of the range of a step, with which PyTorch's own schedules and readers of traces mark steps."""
_PHASES = ("data", "forward", "backward", "optimizer", "other", "evaluate", "save")
_ROWS, _PRINTED_ROWS, _NAME_WIDTH = 100, 10, 60


class StepProfiler:
    """Records the steps of ``logging.profile_steps``. Other steps cost a comparison for each phase.

    The step before the first one is recorded as well, and discarded: it contains the start of the profiler.

    Args:
        steps: first and last step; None: no step is recorded.
        run_folder: the files go to a folder in it.
        ranks: all ranks.
        say: prints a line for people, on the main rank.
    """

    def __init__(self, steps: list[int] | None, run_folder: str | Path, ranks: Ranks, say: Say):
        self._steps = range(steps[0], steps[1] + 1) if steps is not None else range(0)
        self._folder, self._ranks, self._say = Path(run_folder) / PROFILE_FOLDER, ranks, say
        self._profiler: profile | None = None
        self._begun: list[int] = []
        """Numbers of the recorded steps."""
        self._next = 0
        self._of_step: record_function | None = None
        self._of_phase: record_function | None = None

    @property
    def slows_down(self) -> bool:
        """Return whether the current step is recorded, which makes it slower."""
        return self._profiler is not None

    @contextmanager
    def following(self, step: int) -> Iterator[None]:
        """Record the steps after ``step`` that are made inside. An exception discards them."""
        self.step_done(step)
        try:
            yield
        except BaseException:
            self._discard()
            raise
        self._write()

    def begin_phase(self, phase: str) -> None:
        """Name the operators from now on, until the next phase or the end of the step."""
        if self._profiler is None or self._next not in self._steps:
            return
        if self._of_step is None:
            self._of_step = _open(f"{_STEP}{self._next}")
            self._begun.append(self._next)
        self._end_phase()
        self._of_phase = _open(phase)

    def step_done(self, step: int) -> None:
        """Note that ``step`` is complete; begin to record the next one, or write the files after the last one."""
        if not self._steps:
            return
        self._end_step()
        self._next = step + 1
        if self._next > self._steps[-1]:
            self._write()
        elif self._next >= self._steps[0] - 1:
            self._record()

    def _record(self) -> None:
        with self._tolerant():
            if self._profiler is None:
                self._profiler = profile(activities=activities(self._ranks.device))
                self._profiler.prepare_trace()
            if self._next in self._steps and not self._begun:
                self._profiler.start_trace()

    def _end_phase(self) -> None:
        if self._of_phase is not None:
            self._of_phase.__exit__(None, None, None)
            self._of_phase = None

    def _end_step(self) -> None:
        self._end_phase()
        if self._of_step is not None:
            self._of_step.__exit__(None, None, None)
            self._of_step = None

    def _write(self) -> None:
        """Stop the profiler, and write what it recorded, if anything."""
        self._end_step()
        begun, self._begun = self._begun, []
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        with self._tolerant():
            _stop(profiler, bool(begun))
            if begun:
                path = self._folder / f"rank{self._ranks.rank:05}_steps{begun[0]}-{begun[-1]}"
                lines = write_profile(profiler, path, len(begun))
                steps = f"{begun[0]} to {begun[-1]}"
                self._say(f"  profile of steps {steps}: {path}.json.gz, for https://ui.perfetto.dev", *lines)

    def _discard(self) -> None:
        """Stop the profiler without writing. On a GPU it keeps running until the process ends.

        Stopping waits for the GPU, whose collectives may never end when a rank has failed.
        """
        self._end_step()
        profiler, self._profiler = self._profiler, None
        begun, self._begun = self._begun, []
        if begun:
            self._say(f"  no profile is written: the run ends in step {begun[-1]}, before the last profiled step")
        if profiler is not None and self._ranks.device.type != "cuda":
            with self._tolerant():
                _stop(profiler, bool(begun))

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Report an error once, by one rank of each node, and profile no further steps."""
        try:
            yield
        except Exception as error:
            self._profiler, self._steps = None, range(0)
            if read_launcher().local_rank == 0:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
                rank = f"[rank {self._ranks.rank}] " if self._ranks.world_size > 1 else ""
                print(f"{rank}note: no profile in {self._folder}: {reason}; training continues", flush=True)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what to record of a run on ``device``."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _open(name: str) -> record_function:
    opened = record_function(name)
    opened.__enter__()
    return opened


def _stop(profiler: profile, started: bool) -> None:
    if not started:
        profiler.start_trace()  # stopping one that has not started is an error
    profiler.stop_trace()


def write_profile(profiler: profile, path: Path, num_steps: int) -> list[str]:
    """Write the trace ``path``.json.gz and the table ``path``.txt; return the top of the table, for people.

    Raises:
        OSError: they cannot be written. No part of the trace is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = profiler.key_averages()
    summary = summarize(averages, num_steps)
    order = "self_device_time_total" if _on_device(averages) else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=100)
    replace_file(path.with_name(f"{path.name}.txt"), ["\n".join([*summary, "", table, ""]).encode()])
    _write_trace(profiler, path.with_name(f"{path.name}.json.gz"))
    return summary


def _write_trace(profiler: profile, path: Path) -> None:
    # PyTorch can compress it as well, but by way of the folder for temporary files, which may be small.
    with TemporaryDirectory(prefix=".profile-", dir=path.parent) as folder:
        plain, packed = Path(folder, "trace.json"), Path(folder, "trace.json.gz")
        profiler.export_chrome_trace(str(plain))
        if not plain.exists():  # PyTorch only logs an error
            raise OSError("PyTorch could not write the trace; there may be too little space")
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        packed.replace(path)


class _Row(NamedTuple):
    name: str
    calls: float
    """In a step, as the time."""
    milliseconds: float


def summarize(averages: Iterable[Any], num_steps: int) -> list[str]:
    """Return lines with the time of each phase and the operators or kernels with the most time of their own.

    Args:
        averages: ``torch.profiler.profile.key_averages()``. If a GPU was recorded, its times count, else the CPU's.
        num_steps: number of recorded steps.
    """
    averages = list(averages)
    on_device = _on_device(averages)
    here = [one for one in averages if (one.device_type != DeviceType.CPU) == on_device]
    phases = {one.key: _whole(one, on_device) for one in here if one.is_user_annotation and one.key in _PHASES}
    shown = ", ".join(f"{name} {phases[name] / num_steps:,.2f}" for name in _PHASES if name in phases)
    rows = [
        _Row(one.key, one.count / num_steps, _own(one, on_device) / num_steps)
        for one in here
        if not one.is_user_annotation
    ]
    kind = "GPU kernel" if on_device else "CPU operator"
    return [f"  ms in a step: {shown}", *_table(f"{kind}, by its own time", rows)]


def _table(head: str, rows: list[_Row]) -> Iterator[str]:
    yield f"  {head:<{_NAME_WIDTH}}  calls/step    ms/step   share"
    total = sum(row.milliseconds for row in rows) or 1.0
    for name, calls, milliseconds in sorted(rows, key=lambda row: -row.milliseconds)[:_PRINTED_ROWS]:
        shown = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."
        share = milliseconds / total
        yield f"  {shown:<{_NAME_WIDTH}}  {calls:>10,.1f} {milliseconds:>10,.2f} {share:>7.1%}"


def _on_device(averages: Iterable[Any]) -> bool:
    return any(one.device_type != DeviceType.CPU for one in averages)


def _whole(one: Any, on_device: bool) -> float:
    return float(one.device_time_total if on_device else one.cpu_time_total) / 1000


def _own(one: Any, on_device: bool) -> float:
    return float(one.self_device_time_total if on_device else one.self_cpu_time_total) / 1000
