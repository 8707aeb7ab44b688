"""Report that a GPU has run out of memory: how much is in use, in which part of a step, and which settings need less.

Only GPUs report this as an error. On a CPU the operating system ends the process without notice.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config.settings import RunConfig
from .errors import UserError
from .files.atomic import replace_file, temporary_path
from .parallel.memory_check import device_memory
from .parallel.process_group import Ranks
from .planner_process import plan_run

_MOST_ENTRIES = 100_000
"""Number of allocations and releases that PyTorch remembers."""
_PLANNING_SECONDS = 180.0
"""Time limit of the planner. With eight cores it needs some 20 seconds."""
_SHOWN_SETTINGS = 3
_FRAGMENTED = 0.1
"""Share of a GPU's memory that PyTorch may hold without using it before the report mentions fragmentation."""
_GENERAL_ADVICE = (
    "lower training.micro_batch_size, set parallel.recompute to selective or full, or use more ranks "
    "(docs/troubleshooting.md)"
)


class OutOfMemory(UserError):
    """The memory of a GPU is exhausted."""


class MemoryUse(NamedTuple):
    """Bytes of a GPU's memory."""

    allocated: int
    """In tensors."""
    reserved: int
    """Held by PyTorch: in tensors, and cached for later ones."""
    free: int
    """Not held by any process."""
    total: int

    def __str__(self) -> str:
        others = self.total - self.free - self.reserved
        return (
            f"{_gib(self.allocated)} GiB in tensors + {_gib(self.reserved - self.allocated)} cached by PyTorch + "
            f"{_gib(others)} of CUDA and other processes + {_gib(self.free)} free = {_gib(self.total)} GiB"
        )

    @property
    def is_fragmented(self) -> bool:
        """Return whether PyTorch holds much memory that is in no tensor."""
        return self.reserved - self.allocated > _FRAGMENTED * self.total


@dataclass(frozen=True)
class Shortage:
    """What was known when memory was exhausted."""

    rank: int
    where: str
    """Step and phase."""
    error: str
    """Message of PyTorch, on one line."""
    use: MemoryUse | None
    """None for an error without a GPU."""
    snapshot: Path | None
    stack: str
    """The Python stack of the allocation."""

    def __str__(self) -> str:
        requested = next((part for part in self.error.split(". ") if part.startswith("Tried")), "")
        requested = requested and f", which t{requested[1:]}"
        parts = [f"out of memory on rank {self.rank} in {self.where}{requested}", str(self.use or "")]
        if self.use is not None and self.use.is_fragmented:
            parts.append("much is cached: PYTORCH_ALLOC_CONF=expandable_segments:True reduces fragmentation")
        return "; ".join(filter(None, parts))


class MemoryGuard:
    """Notes when memory is exhausted, before anything is released, and ends the run with a report about it.

    Args:
        config: of the run.
        ranks: all ranks. The first one without memory plans for all of them.
    """

    def __init__(self, config: RunConfig, ranks: Ranks):
        self._config, self._ranks = config, ranks
        self._shortage: Shortage | None = None
        self._records = config.logging.memory_snapshot == "on_oom" and ranks.device.type == "cuda"
        self._seconds = min(_PLANNING_SECONDS, config.parallel.timeout_seconds / 2)
        if self._records:
            # Stacks of C++ code would make an allocation several times slower.
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ENTRIES, stacks="python")

    def note(self, error: BaseException, where: str) -> None:
        """Remember the state of the memory if ``error`` is an exhausted GPU, write the snapshot, and release tensors.

        Args:
            error: that ends the run.
            where: step and phase.
        """
        if not is_out_of_memory(error) or self._shortage is not None:
            return
        self._shortage = Shortage(
            rank=self._ranks.rank,
            where=where,
            error=" ".join(str(error).split()),
            use=memory_use(self._ranks.device),
            snapshot=self._write_snapshot(),
            stack="".join(traceback.format_tb(error.__traceback__)),
        )
        traceback.clear_frames(error.__traceback__)  # their tensors would leave no memory for saving the state

    @contextmanager
    def explained(self, where: Callable[[], str]) -> Iterator[None]:
        """Replace an error about exhausted memory by a report. ``where`` returns the phase, for errors not noted yet.

        Other errors for users are raised on all ranks, and their handlers may wait for the others. This one is not.

        Raises:
            OutOfMemory: has the use of memory, and settings that need less.
        """
        try:
            yield
        except Exception as error:
            self.note(error, where())
            if self._shortage is None or not is_out_of_memory(error):
                raise
            raise self._report(self._shortage) from error

    def _write_snapshot(self) -> Path | None:
        if not self._records:
            return None
        path = Path(self._config.run_folder) / f"memory_snapshot_rank{self._ranks.rank}.pickle"
        temporary = temporary_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(temporary))
            temporary.replace(path)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            print(f"note: {path} cannot be written: {' '.join(str(error).split())[:300]}", flush=True)
            return None
        return path

    def _report(self, shortage: Shortage) -> OutOfMemory:
        if not self._is_first():
            self._wait_for_plan()  # the launcher ends all ranks when one exits
            report = OutOfMemory(f"{shortage}; another rank reports which settings need less memory")
            report.printed_elsewhere = True
            return report
        try:
            return self._planned_report(shortage)
        finally:
            if self._ranks.store is not None:
                self._ranks.store.set(_PLANNED, "1")

    def _planned_report(self, shortage: Shortage) -> OutOfMemory:
        print(f"{shortage}: looking for settings that need less, for at most {self._seconds:.0f} s", flush=True)
        try:
            plan, advice = find_savings(self._config, self._ranks, self._seconds), ""
        except UserError as problem:
            plan, advice = {"savings": []}, f"{_GENERAL_ADVICE}; the planner failed: {problem}"
        page = Path(self._config.run_folder) / f"out_of_memory_rank{self._ranks.rank}.md"
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            replace_file(page, [format_page(shortage, plan).encode()])
            seen = [f"see {page}"]
        except OSError as error:
            seen = [f"{page} cannot be written: {error.strerror or error}"]
        if shortage.snapshot is not None:
            seen.append(f"{shortage.snapshot} for https://pytorch.org/memory_viz")
        return OutOfMemory("; ".join([str(shortage), advice or describe_savings(plan), *seen]))

    def _is_first(self) -> bool:
        store = self._ranks.store
        return self._ranks.world_size == 1 or store is None or store.add(_SHORT, 1) == 1

    def _wait_for_plan(self) -> None:
        until = time.monotonic() + self._seconds
        while time.monotonic() < until and not self._ranks.store.check([_PLANNED]):  # type: ignore[union-attr]
            time.sleep(0.1)


_SHORT, _PLANNED = "out_of_memory/ranks", "out_of_memory/planned"
"""Keys in the launcher's store: number of ranks without memory, and that the first of them has planned."""


@contextmanager
def in_one_line(remedy: str) -> Iterator[None]:
    """Replace an error about exhausted memory by one line, for commands that do not train.

    Args:
        remedy: what the user can do.

    Raises:
        OutOfMemory: instead of the error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise OutOfMemory(f"the memory of the GPU is exhausted: {reason}; {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` is a GPU without memory: of PyTorch's allocator, or of a library with its own."""
    libraries = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    of_library = isinstance(error, RuntimeError) and any(text in str(error) for text in libraries)
    return isinstance(error, torch.OutOfMemoryError) or of_library


def memory_use(device: torch.device) -> MemoryUse | None:
    """Return the use of a GPU's memory now; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), free, total)


def find_savings(config: RunConfig, ranks: Ranks, seconds: float) -> dict[str, Any]:
    """Return the record of ``tools/plan.py --savings`` for a run on the GPUs of ``ranks``.

    Args:
        config: of the run.
        ranks: all ranks.
        seconds: time limit.

    Raises:
        UserError: the planner cannot plan the run, or needs more time.
    """
    return plan_run(config, ranks, device_memory(ranks.device), seconds, "--reserve", "0", "--savings")


def describe_savings(plan: dict[str, Any]) -> str:
    """Return the three best changes of a plan, for the error."""
    best: dict[str, dict[str, Any]] = {}
    for saving in plan["savings"]:
        best.setdefault(next(iter(saving["settings"])), saving)  # the largest saving of each setting
    if not best:
        return "the planner finds no setting that needs less memory: use more or larger GPUs"
    changes = [
        f"{one['shown']} (saves {_gib(one['saved_bytes'])} GiB{', ' * bool(one['drawback'])}{one['drawback']})"
        for one in list(best.values())[:_SHOWN_SETTINGS]
    ]
    return f"set {' or '.join(changes)}, by tools/plan.py"


def format_page(shortage: Shortage, plan: dict[str, Any]) -> str:
    """Return the report as Markdown.

    Args:
        shortage: what is known.
        plan: record of ``tools/plan.py --savings``; only ``savings``, empty, if there is none.
    """
    lines = [f"# Out of memory on rank {shortage.rank}", "", f"In {shortage.where}: {shortage.error}", ""]
    if shortage.use is not None:
        lines += ["| memory | GiB |", "| --- | ---: |"]
        lines += [f"| {name} | {_gib(size)} |" for name, size in shortage.use._asdict().items()]
    if plan["savings"]:
        lines += ["", *_plan_tables(plan)]
    return "\n".join([*lines, "", "## Where", "", "```text", shortage.stack.rstrip(), "```", ""])


def _plan_tables(plan: dict[str, Any]) -> Iterator[str]:
    fullest = max(plan["ranks"], key=lambda rank: sum(rank["peak_bytes"].values()))
    yield "## What the memory is for, by the planner"
    yield from ("", "| GiB on the fullest GPU, at the peak of a step | |", "| --- | ---: |")
    yield from (f"| {kind} | {_gib(size)} |" for kind, size in fullest["peak_bytes"].items())
    yield from (f"| **all** | **{_gib(plan['peak_bytes'])}** |", "", "## Settings that need less", "")
    yield from ("| instead of the configured value | GiB saved | peak GiB | |", "| --- | ---: | ---: | --- |")
    for one in plan["savings"]:
        yield f"| {one['shown']} | {_gib(one['saved_bytes'])} | {_gib(one['peak_bytes'])} | {one['drawback']} |"


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.2f}" if gib >= 0.1 or not gib else f"{gib:.3g}"
