"""Run the stages of a part, each as a process with a hard time limit, and keep what they found at any moment.

The files of a part, in the output folder: ``part1.json`` with the records of all stages, including what each of them
wrote; ``part1.md`` with the table; ``part1.tar.gz`` with logs, readings of the GPU, profile and trace.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..report import BenchmarkReport, table
from .plan import RESERVE_SECONDS, Setting, Stage, part_folder, site_folder, stages
from .results import headline, problem, read_result, step_rate
from .sensors import DESCRIBED, Sensors, describe

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 5.0
"""No stage is started with less time left."""
END_SECONDS = 8.0
"""A command that is told its time limit gets this much less, for its start and for its last words."""
KILL_SECONDS = 3.0
"""Maximum time to wait for the end of killed processes."""
TAIL = 4000
"""Maximum number of characters of a stage's output in its record."""
WRITE_SECONDS = 2.0
"""While a stage runs, its record is written this often."""


@dataclass
class StageRecord:
    """What is known about a stage."""

    name: str
    command: str
    limit_seconds: float
    goal: str
    state: str = "running"
    """ok, failed, timed out, interrupted, no time left; running in a file that was written meanwhile."""
    seconds: float = 0.0
    exit_code: int | None = None
    """None: stopped, or not started."""
    headline: str = ""
    problem: str | None = None
    """Error of correctness."""
    gpu: dict[str, Any] | str = "not available"
    """Clocks, power, temperature and memory; see sensors.py."""
    tail: str = ""
    """The end of its output."""
    result: dict[str, Any] | None = None
    """The report that it wrote, complete or not."""


@dataclass
class PartRun:
    """A part that is being run."""

    part: int
    setting: Setting
    output: Path
    seconds: float
    """Hard limit of the part."""
    report: BenchmarkReport
    sensors: Sensors
    started: float = field(default_factory=time.monotonic)
    records: list[StageRecord] = field(default_factory=list)
    granted: float = 0.0
    """Sum of the limits of the stages so far."""

    def run(self) -> list[str]:
        """Run all stages; return the errors of correctness."""
        folder = part_folder(self.setting.work, self.part)
        shutil.rmtree(folder, ignore_errors=True)  # an old result must not count for a stage that writes none
        folder.mkdir(parents=True)
        with self.sensors:
            for stage in stages(self.part, self.setting):
                record = self._run_stage(stage)
                self.write(archive=True)
                print(f"{record.name}: {record.state}, {record.seconds:.0f} s. {record.headline}", flush=True)
                if self.interrupted:
                    break
        return self.problems()

    @property
    def interrupted(self) -> bool:
        """Whether this process was asked to end."""
        return any(record.state == "interrupted" for record in self.records)

    def problems(self) -> list[str]:
        """Return the errors of correctness so far."""
        return [f"{record.name}: {record.problem}" for record in self.records if record.problem]

    def _run_stage(self, stage: Stage) -> StageRecord:
        limit = self._limit(stage)
        command = [word.replace("{seconds}", f"{max(limit - END_SECONDS, 1):.1f}") for word in stage.command]
        record = StageRecord(stage.name, shlex.join(command), limit, stage.goal)
        self.records.append(record)
        if limit < LEAST_SECONDS:
            record.state = "no time left"
        else:
            self._run_command(stage, command, record)
        if stage.checks and record.problem is None and record.state not in ("ok", "interrupted"):
            record.problem = record.state
        return record

    def _limit(self, stage: Stage) -> float:
        """Return the time limit of the next stage: its own, and what stages before it left of theirs."""
        elapsed = time.monotonic() - self.started
        self.granted += stage.limit_seconds
        limit = stage.limit_seconds if stage.is_fixed else max(stage.limit_seconds, self.granted - elapsed)
        return min(limit, self.seconds - RESERVE_SECONDS * self.setting.scale - elapsed)

    def _run_command(self, stage: Stage, command: list[str], record: StageRecord) -> None:
        folder = part_folder(self.setting.work, self.part)
        log, result = folder / f"{stage.name}.log", folder / f"{stage.name}.json"
        began = time.monotonic()

        def update(state: str) -> None:
            now, text = time.monotonic(), log.read_text(encoding="utf-8", errors="replace")
            record.state, record.seconds, record.tail = state, now - began, text[-TAIL:]
            record.result = read_result(result)
            record.gpu = self.sensors.summarize(began, now)
            try:
                record.headline = headline(stage.kind, record.result, text) + _of_baseline(stage, record.result)
                if stage.checks and state != "running":
                    record.problem = problem(stage.kind, record.result, text)
            except Exception as error:  # the report is kept, and no mistake in reading it may stop the other stages
                record.headline = f"cannot be read: {type(error).__name__}: {error}"
                record.problem = record.headline if stage.checks and state != "running" else None

        def keep() -> None:
            update("running")
            self.write()

        environment = stage_environment(self.setting.work)
        record.exit_code, interrupted = run_command(command, log, record.limit_seconds, environment, keep)
        ended = "timed out" if record.exit_code is None else "failed"
        update("interrupted" if interrupted else "ok" if record.exit_code in stage.benign_codes else ended)

    def write(self, archive: bool = False) -> None:
        """Write the files of the part, so that they survive the end of this process and the loss of the machine."""
        name = f"part{self.part}"
        self.report.rows = [asdict(record) for record in self.records]
        self.report.summary = {"problems": self.problems(), "seconds": time.monotonic() - self.started}
        self.report.write(self.output / f"{name}.json", "--output")
        text = self.format()
        partial = self.output / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.output / f"{name}.md")
        if archive:
            readings = json.dumps({"readings": self.sensors.readings, "problem": self.sensors.problem})
            pack(part_folder(self.setting.work, self.part), self.output / f"{name}.tar.gz", {"sensors.json": readings})

    def format(self) -> str:
        """Return the table of the part, and the end of the output of each stage that did not succeed."""
        rows = [[one.name, one.state, f"{one.seconds:.0f}", one.goal, one.headline] for one in self.records]
        gpu = [[one.name, *describe(one.gpu)] for one in self.records]
        lines = [f"# GPU check, part {self.part}", ""]
        lines += [*table(["stage", "state", "seconds", "goal", "found"], rows), ""]
        lines += [*table(["stage", *DESCRIBED], gpu), ""]
        problems = self.problems()
        lines += [f"- FAILED: {one}" for one in problems] or ["No check of correctness has failed."]
        for one in self.records:
            if one.state not in ("ok", "running"):
                lines += ["", f"## {one.name}: {one.state}", "", f"`{one.command}`", "", "```", one.tail.strip(), "```"]
        return "\n".join(lines) + "\n"


def _of_baseline(stage: Stage, result: dict[str, Any] | None) -> str:
    """Return this stage's tokens/s as a multiple of an earlier stage's, if both are known."""
    if stage.baseline is None:
        return ""
    rate, other = step_rate(result), step_rate(read_result(stage.baseline))
    return f", {rate / other:.3f} x {stage.baseline.parent.name}/{stage.baseline.stem}" if rate and other else ""


def stage_environment(work: Path) -> dict[str, str]:
    """Return the environment of the stages: the carried packages, and caches of compiled kernels for both parts."""
    path = os.pathsep.join(filter(None, (str(site_folder(work)), os.environ.get("PYTHONPATH"))))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    return {**os.environ, **caches, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def run_command(
    command: list[str], log: Path, limit: float, environment: Mapping[str, str], keep: Callable[[], None]
) -> tuple[int | None, bool]:
    """Run a command in its own process group, and end the whole group after it, so that nothing uses the GPU then.

    Returns:
        the exit code, None if it was stopped; and whether this process was asked to end.
    """
    deadline, interrupted = time.monotonic() + limit, False
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, **_GROUP)
        try:
            while (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(left, WRITE_SECONDS))
                    break
                keep()
        except KeyboardInterrupt:
            interrupted = True
        code = process.poll()
        end_group(process)
    return code, interrupted


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with all that it started, and wait for it: until its end a process keeps its memory of the GPU."""
    deadline = time.monotonic() + KILL_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # raises when the last one has ended
            time.sleep(0.05)
    process.wait()


# Not a session of its own: what removes the processes of a session that was killed must find them.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def pack(folder: Path, path: Path, more: Mapping[str, str]) -> None:
    """Write an archive of a folder and of further texts by their names."""
    partial = path.with_name(f"{path.name}.partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        archive.add(folder, arcname=folder.name)
        for name, text in more.items():
            data = text.encode()
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    partial.replace(path)
