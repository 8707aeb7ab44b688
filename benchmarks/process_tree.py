"""Measure a command: CPU time of all its processes, wall time, and the peak memory of the whole process tree.

CPU time is exact. ``getrusage(RUSAGE_CHILDREN)`` of the caller would miss processes that no parent waited for, such as
the fork server of multiprocessing with all its workers. So the command runs under a keeper process that adopts every
orphan of the tree (``PR_SET_CHILD_SUBREAPER``) and waits for each. ``wait4`` returns the CPU time of a process, in all
threads, including that of the children which it waited for itself.

Memory is sampled: the largest sum over the tree of each process's proportional set size, where a page shared by several
processes counts once. Pages of mapped files are counted separately: the system reclaims them when it needs memory.
Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.system import require_linux

_PR_SET_CHILD_SUBREAPER = 36
_SAMPLE_SECONDS = 0.1
_ORPHAN_SECONDS = 30.0
"""Seconds that processes may outlive the command before they are killed."""


@dataclass(frozen=True)
class Cost:
    """The cost of a command."""

    cpu_seconds: float
    """User and system time of all processes."""
    wall_seconds: float
    """From the command's start to its end."""
    peak_mb: float
    """Largest sample of the tree's memory, without pages of mapped files."""
    peak_with_files_mb: float
    """The same including mapped files."""
    largest_process_mb: float
    """Peak resident set of the largest process; exact, and counts shared pages in full."""
    processes: int
    """Number of processes that the keeper waited for: the command and its orphans."""


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[Cost, str]:
    """Run ``command``; return its cost and its standard output.

    Raises:
        UserError: it failed; shows the last line of its output. Or this is not Linux.
    """
    require_linux("measuring a process tree")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "cost.json"
        keeper = [sys.executable, __file__, str(result), *command]
        running = subprocess.Popen(
            keeper,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            output, errors = running.communicate()
        except BaseException:
            # Ctrl-C: ending only the keeper would leave the command running.
            os.killpg(running.pid, signal.SIGTERM)
            running.wait()
            raise
        if running.returncode != 0 or not result.exists():
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{' '.join(command[:3])} ...: exit status {running.returncode}: {last}")
        return Cost(**json.loads(result.read_bytes())), output


def keep(command: Sequence[str]) -> tuple[int, Cost]:
    """Run ``command`` as a child of this process; return its exit status and cost. For the keeper process only."""
    _adopt_orphans()
    # An interrupt is sent to the whole group; this process stays until the others have ended.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sampler = _Sampler()
    sampler.start()
    started = time.monotonic()
    child = subprocess.Popen(command)
    status, wall, cpu, largest, count = 1, 0.0, 0.0, 0, 0
    while True:
        try:
            pid, code, usage = os.wait4(-1, 0)
        except ChildProcessError:
            break
        cpu += usage.ru_utime + usage.ru_stime
        largest = max(largest, usage.ru_maxrss)
        count += 1
        if pid == child.pid:
            wall = time.monotonic() - started
            status = child.returncode = os.waitstatus_to_exitcode(code)
            sampler.deadline = time.monotonic() + _ORPHAN_SECONDS
    sampler.stop()
    return status, Cost(cpu, wall, sampler.peak / 1e6, sampler.peak_with_files / 1e6, largest * 1024 / 1e6, count)


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise UserError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


class _Sampler(threading.Thread):
    """Samples the memory of this process's descendants; after ``deadline`` it ends the remaining ones."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.peak_with_files = 0
        self.deadline: float | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            pids = [process.pid for process in psutil.Process().children(recursive=True)]
            samples = [_proportional_bytes(pid) for pid in pids]
            self.peak = max(self.peak, sum(own for own, _ in samples))
            self.peak_with_files = max(self.peak_with_files, sum(own + mapped for own, mapped in samples))
            if self.deadline is not None and time.monotonic() > self.deadline:
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()


def _proportional_bytes(pid: int) -> tuple[int, int]:
    """Return the proportional set size of a process without pages of mapped files, and that of these; zeros after its
    end.
    """
    found: dict[bytes, int] = {}
    with suppress(OSError):
        for line in Path("/proc", str(pid), "smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss"):
                name, size, _ = line.split()
                found[name] = int(size) * 1024
    mapped = found.get(b"Pss_File:", 0)  # since Linux 5.9
    return found.get(b"Pss:", 0) - mapped, mapped


def main() -> None:
    """Run the keeper: ``python benchmarks/process_tree.py RESULT COMMAND...``."""
    parser = CommandParser(description="Run a command, and write its cost in CPU time, wall time and memory as JSON.")
    parser.add_argument("result", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="with its arguments")
    options = parser.parse_args()
    if not options.command:
        raise UserError("COMMAND: is missing; see --help")
    status, cost = keep(options.command)
    options.result.write_text(json.dumps(asdict(cost)), encoding="utf-8")
    sys.exit(status)


if __name__ == "__main__":
    run_command(main)
