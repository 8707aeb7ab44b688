"""A lineage: faults one after another in one run folder, each followed by the same command, and an undisturbed end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fault_judge as judge
import fault_mounts as mounts
from fault_cases import EARLY_POINTS, POINTS, RESUME_POINTS, Case
from fault_damage import DAMAGES, Done
from fault_launch import LONGEST_SECONDS, Launch, run_command, send_signal, wait_for

KEEP_LAST = 2
LEAST_STEPS = 24
"""A fault needs so many steps ahead of it to be reached."""
_RANK_TRACEBACK = re.compile(r"^\[rank\d+\]: Traceback", re.MULTILINE)
"""As PyTorch marks it; the launcher prints one of its own."""
_ERROR = re.compile(r"\b(error|\w+Error): ")
_REASONS = {
    "ENOSPC": "No space left on device",
    "EIO": "Input/output error",
    "EDQUOT": "Disk quota exceeded",
    "EROFS": "Read-only file system",
    "EPERM": "Operation not permitted",
}


@dataclass
class Result:
    """What came of a case."""

    case: Case
    verdict: str = "exact"
    """exact, refused, wrong, or not reached (the fault did not happen)."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    happened: str = ""
    seconds: float = 0.0
    lineage: str = ""

    def wrong(self, problems: list[str]) -> None:
        """Not what was to come of it."""
        self.verdict = "wrong"
        self.problems += problems


@dataclass(frozen=True)
class Workshop:
    """What all lineages share."""

    folder: Path
    run_file: Path
    reference: judge.Reference
    midway: Callable[[], Path]
    """Run folder that was killed half-way; to be copied."""


@dataclass
class _Round:
    """A launch, what led to it, and what came of it."""

    before: judge.Rest
    results: list[Result]
    rest: Done | None = None
    judged: Launch | None = None
    text: str = ""
    code: int | None = None
    fired: bool = True
    hung: bool = False
    problems: list[str] = field(default_factory=list)


class Lineage:
    """Runs its cases; see :meth:`run`.

    Args:
        workshop: shared by all.
        name: of its folder.
        cases: in order, with the same options.
        on_result: hears of every case that is done.
    """

    def __init__(
        self, workshop: Workshop, name: str, cases: list[Case], on_result: Callable[[Result], object] = lambda _: None
    ):
        self.workshop, self.reference, self.name = workshop, workshop.reference, name
        self.queue = [case if mounts.can_mount() else _without_mounts(case) for case in cases]
        self.on_result = on_result
        self.folder = workshop.folder / name
        self.folder.mkdir(parents=True)
        self.disk = self.folder / "disk"
        self.canary = self.folder / "canary"
        self.options = cases[0].options
        self.num_runs = self.num_launches = 0
        self.run_folder: Path | None = None
        self.touched: set[str] = set()
        self.open: list[Result] = []
        """Cases of this run folder that are not judged to the end."""
        self.done: list[Result] = []

    def run(self) -> list[Result]:
        """All cases, each with its relaunch, and to the end of the run."""
        try:
            while self.queue or self.open:
                if self.run_folder is None:
                    self._begin_run()
                self._round(*self._take())
        except Exception:  # so that one lineage costs no others their results
            for result in self.open:
                result.wrong([f"the harness failed: {traceback.format_exc()}"])
        finally:
            self._clean_up()
        return self.done

    # ---------------------------------------------------------------------------------------------------------------
    # The run folder

    def _begin_run(self) -> None:
        self.num_runs += 1
        self.touched = set()
        needs_disk = any(case.fault and case.fault["by"] == "disk" for case in self.queue)
        parent = self.folder
        if needs_disk:
            self.disk.mkdir(exist_ok=True)
            mounts.unmount(self.disk)
            mounts.mount_disk(self.disk)
            parent = self.disk
        self.run_folder = (parent / f"run{self.num_runs}").resolve()
        if self.queue and _needs_checkpoints(self.queue[0]):
            shutil.copytree(self.workshop.midway(), self.run_folder)
        else:
            self.run_folder.mkdir()

    def _take(self) -> tuple[Case | None, Case | None]:
        """What is done before the next launch, and what during it."""
        assert self.run_folder is not None
        rest = judge.at_rest(self.run_folder, self.reference, self.touched)
        if not self.queue or self.reference.last_step - (rest.newest or 0) < LEAST_STEPS:
            return None, None
        if _needs_checkpoints(self.queue[0]) and len(rest.complete) < KEEP_LAST:
            return None, None
        case = self.queue.pop(0)
        if case.rest is None:
            return None, case
        if not case.refused and self.queue and self.queue[0].fault and _tells_of_its_start(self.queue[0]):
            return case, self.queue.pop(0)
        return case, None

    def _close_run(self, keep: bool) -> None:
        for result in self.open:
            self.done.append(result)
            self.on_result(result)
        self.open = []
        assert self.run_folder is not None
        if keep:
            shutil.copytree(self.run_folder, self.folder / "evidence" / self.run_folder.name, symlinks=True)
        shutil.rmtree(self.run_folder)
        self.run_folder = None

    def _clean_up(self) -> None:
        if self.run_folder is not None:
            mounts.unmount(self.run_folder / "checkpoints")
            mounts.unmount(self.run_folder)
        if self.disk.exists():
            mounts.unmount(self.disk)
        left = [Result(case, "wrong", ["was not tried"], lineage=self.name) for case in self.queue]
        for result in [*self.open, *left]:
            self.done.append(result)
            self.on_result(result)

    # ---------------------------------------------------------------------------------------------------------------
    # One launch

    def _round(self, rest_case: Case | None, fault_case: Case | None) -> None:
        assert self.run_folder is not None
        began = time.monotonic()
        before = judge.at_rest(self.run_folder, self.reference, self.touched)
        this = _Round(before, [Result(case, lineage=self.name) for case in (rest_case, fault_case) if case])
        if rest_case is not None and rest_case.refused:
            self._refused(this, rest_case)
        else:
            self._disturb_and_launch(this, rest_case, fault_case)
            self._judge(this, rest_case, fault_case)
        for result in this.results:
            result.seconds = round((time.monotonic() - began) / len(this.results), 1)
        former, self.open = self.open, self.open + this.results
        if this.problems:
            where = f"launch {self.num_launches}"
            for result in this.results or former:
                result.wrong([f"{where}: {problem}" for problem in this.problems])
            if this.results and former:
                former[-1].notes.append(f"{where}, which came next, went wrong")
            self._close_run(keep=True)
        elif not rest_case and not fault_case and this.code == 0:
            problems = judge.finished(self.run_folder, self.reference, self.touched)
            for result in self.open if problems else []:
                result.wrong([f"at the end: {problem}" for problem in problems])
            self._close_run(keep=bool(problems))

    def _launch(self, fault: dict[str, Any] | None = None) -> Launch:
        assert self.run_folder is not None
        self.num_launches += 1
        log = self.folder / f"launch{self.num_launches:02d}.log"
        command = run_command(self.workshop.run_file, self.run_folder, self.options)
        return Launch(command, log, fault.get("spec") if fault else None, self.run_folder)

    def _disturb_and_launch(self, this: _Round, rest_case: Case | None, fault_case: Case | None) -> None:
        assert self.run_folder is not None
        if rest_case is not None:
            assert rest_case.rest is not None
            this.rest = DAMAGES[rest_case.rest["do"]](self.run_folder, canary=self.canary, **_parameters(rest_case))
            self.touched |= this.rest.touched
            this.results[0].happened = this.rest.what
            this.before = judge.at_rest(self.run_folder, self.reference, self.touched)
        launch = this.judged = self._launch(fault_case.fault if fault_case else None)
        try:
            if fault_case is None:
                this.hung = not launch.wait(LONGEST_SECONDS)
            else:
                self._drive(launch, this, fault_case)
        finally:
            launch.end()
            mounts.unmount(self.run_folder / "checkpoints")
        this.text, this.code = this.judged.text(), this.judged.process.returncode
        if launch.fired():
            this.results[-1].happened = "; ".join(map(str, launch.fired()))

    def _drive(self, launch: Launch, this: _Round, case: Case) -> None:
        """Let the fault happen and the launch end."""
        fault = case.fault
        assert fault is not None and self.run_folder is not None
        meanwhile: AbstractContextManager[None] = nullcontext()
        if fault["by"] in ("hook", "overtaken"):
            wait_for(lambda: launch.fired() or launch.ended(), LONGEST_SECONDS)
            this.fired = bool(launch.fired())
            if fault["by"] == "overtaken":
                self._overtake(launch, this, fault)
                return
            stopped = [line["pid"] for line in launch.fired() if line["action"] == "stop"]
        else:
            this.fired = self._reach(launch, fault["at"], this.before.newest or 0)
            step, stopped = launch.step(), []
            if fault["by"] == "disk":
                meanwhile = mounts.filled(self.disk, fault["left"])
            elif fault["by"] == "read_only":
                this.fired = wait_for((self.run_folder / "checkpoints").is_dir, 60)
                mounts.make_read_only(self.run_folder / "checkpoints")
            else:
                number = signal.Signals[f"SIG{fault['signal']}"]
                sent = launch.send(fault["target"], number)
                this.fired = this.fired and bool(sent)
                stopped = sent if "stop_seconds" in fault else []
            this.results[-1].happened = f"after step {step}, {time.monotonic() - launch.began:.2f} s after the start"
        if stopped:
            stop_seconds = fault.get("stop_seconds") or fault["spec"]["stop_seconds"]
            time.sleep(stop_seconds)
            for pid in stopped:
                send_signal(pid, signal.SIGCONT)
        with meanwhile:
            self._end(launch, this, fault["then"])

    def _reach(self, launch: Launch, at: dict[str, Any], newest: int) -> bool:
        """Wait for the moment ``at``; whether the launch still runs then."""
        if "seconds" in at:
            launch.wait(at["seconds"])
        else:
            wait_for(lambda: launch.step() >= newest + at["steps"] or launch.ended(), LONGEST_SECONDS)
            time.sleep(at["delay"])
        return not launch.ended()

    def _end(self, launch: Launch, this: _Round, then: dict[str, Any]) -> None:
        if "seconds" in then:
            launch.wait(then["seconds"])
        elif "steps" in then:
            goal = max(launch.step(), this.before.newest or 0) + then["steps"]
            this.hung = not wait_for(lambda: launch.step() >= goal or launch.ended(), LONGEST_SECONDS)
        else:
            if "relaunch" in then:
                self._relaunch_beside(launch, this)
            this.hung = not launch.wait(LONGEST_SECONDS)

    def _relaunch_beside(self, orphans: Launch, this: _Round) -> None:
        """The same command, while ranks without a launcher may still write to the run folder."""
        second = self._launch()
        try:
            wait_for(lambda: second.ended() or second.step() > 0, LONGEST_SECONDS)
            if second.step() and "rank 0" in orphans.pids():
                this.problems.append("two runs write to one folder")
            refused = "is writing to it" in second.text() and second.process.returncode
            # They may also have come to the end meanwhile.
            if not second.step() and not refused and second.process.returncode != 0:
                this.problems.append(f"relaunch beside orphans: {_last_lines(second.text())}")
            this.results[-1].notes.append("relaunch refused: locked" if refused else "relaunch went on")
        finally:
            second.end()

    def _overtake(self, launch: Launch, this: _Round, fault: dict[str, Any]) -> None:
        """``launch`` is held up while it looks at the checkpoints; the same command is faster, and then it goes on."""
        faster = this.judged = self._launch()
        try:
            self._end(faster, this, fault["then"])
        finally:
            faster.end()
        launch.send("rank 0", signal.SIGCONT)
        this.hung = this.hung or not launch.wait(LONGEST_SECONDS)
        launch.end()
        this.results[-1].notes.append(f"it ended with {launch.process.returncode}: {_last_lines(launch.text())}")

    # ---------------------------------------------------------------------------------------------------------------
    # Judging it

    def _judge(self, this: _Round, rest_case: Case | None, fault_case: Case | None) -> None:
        assert self.run_folder is not None
        if this.hung:
            this.problems.append(f"the launch has not ended after {LONGEST_SECONDS:.0f} s")
        if not this.fired:
            this.results[-1].verdict = "not reached"
        self._judge_start(this, fault_case)
        if this.rest is not None:
            self._judge_rest(this)
        after = judge.at_rest(self.run_folder, self.reference, self.touched)
        this.problems += after.problems + judge.lost(this.before, after, KEEP_LAST)
        if (after.newest or 0) < (this.before.newest or 0):
            this.problems.append(f"the newest checkpoint is of step {after.newest}, and was of {this.before.newest}")
        if self.canary.exists():
            this.problems.append("a pickle was executed")
        if fault_case is None:
            if this.code != 0:
                this.problems.append(f"undisturbed, it ended with {this.code}: {_last_lines(this.text)}")
        elif this.fired:
            self._judge_end(this, fault_case)
        if this.results and _RANK_TRACEBACK.search(this.text):
            this.results[-1].notes.append("a rank printed a traceback")

    def _judge_start(self, this: _Round, fault_case: Case | None) -> None:
        """It went on from the newest sound checkpoint."""
        first = re.search(r"^step +(\d+)/", this.text, re.MULTILINE)
        newest = this.before.newest or 0
        if first and int(first[1]) != newest + 1:
            this.problems.append(f"launch began with step {first[1]}, the newest sound checkpoint is of {newest}")
        resumed = re.search(r"resumed from \S*step-(\d+)", this.text)
        if bool(resumed and int(resumed[1])) != bool(newest) and first:
            this.problems.append(f"launch began from {resumed and resumed[1]}, the newest sound checkpoint is {newest}")
        if not first and (fault_case is None or _tells_of_its_start(fault_case)) and newest < self.reference.last_step:
            this.problems.append(f"launch began no step: {_last_lines(this.text)}")

    def _judge_rest(self, this: _Round) -> None:
        """What was damaged is named and set aside; what was put there is still there."""
        assert self.run_folder is not None and this.rest is not None
        folder = self.run_folder / "checkpoints"
        if this.rest.named:
            checkpoint, _, file = this.rest.named.partition("/")
            said = [line for line in this.text.splitlines() if "quarantined" in line and checkpoint in line]
            if not any(file in line or "manifest.json" in line for line in said):
                this.problems.append(f"undetected: no line names {this.rest.named} as set aside")
            for name in this.rest.touched:
                if not any(folder.glob(f"{name}.damaged*")):
                    this.problems.append(f"{name} was damaged and is not set aside")
        gone = [name for name in this.rest.touched if not this.rest.named and not os.path.lexists(folder / name)]
        this.problems += [f"{name} is not the program's and was removed" for name in gone]
        if this.rest.named:
            self.touched -= this.rest.touched
            self.touched |= {path.name for path in folder.glob("step-*.damaged*")}

    def _judge_end(self, this: _Round, case: Case) -> None:
        """How the launch ended fits what was done to it."""
        fault = case.fault
        assert fault is not None
        if fault.get("survives") and this.code != 0:
            this.problems.append(f"a run that was to survive ended with {this.code}: {_last_lines(this.text)}")
        if fault.get("saves") and not re.search("stopped at step .* as requested", this.text):
            this.problems.append(f"it has not saved: {_last_lines(this.text)}")
        if fault.get("names_rank"):
            rank = fault["target"]
            if this.code == 0 or not re.search(rf"{rank}\b.*(no heartbeat|has not reached)", this.text):
                this.problems.append(f"{rank} was stopped for ever and is not named: {_last_lines(this.text)}")
        code = {"disk": "ENOSPC", "read_only": "EROFS"}.get(fault["by"]) or fault.get("spec", {}).get("errno")
        if code and _REASONS[code] not in this.text:
            this.problems.append(f"nobody is told of {_REASONS[code]}: {_last_lines(this.text)}")

    def _refused(self, this: _Round, case: Case) -> None:
        """A launch that must refuse and leave everything as it is; then the cause is removed."""
        assert self.run_folder is not None and case.rest is not None
        [result] = this.results
        backup = self.folder / "backup"
        shutil.copytree(self.run_folder, backup, symlinks=True)
        named = "Read-only file system"
        if case.rest["do"] == "read_only":
            mounts.make_read_only(self.run_folder)
        else:
            done = DAMAGES[case.rest["do"]](self.run_folder, canary=self.canary, **_parameters(case))
            named, result.happened = done.named.split("/")[0], done.what
        was = judge.tree(self.run_folder)
        launch = self._launch()
        this.hung = not launch.wait(LONGEST_SECONDS)
        launch.end()
        this.text, this.code = launch.text(), launch.process.returncode
        if judge.tree(self.run_folder) != was:
            this.problems.append("a refused launch has changed the run folder")
        mounts.unmount(self.run_folder)
        errors = [line for line in this.text.splitlines() if "error: " in line]
        if this.code == 0 or not any(named in line for line in errors) or launch.step():
            this.problems.append(f"not refused with a line that names {named}: {_last_lines(this.text)}")
        if self.canary.exists():
            this.problems.append("a pickle was executed")
        if _RANK_TRACEBACK.search(this.text):
            result.notes.append("a rank printed a traceback")
        result.verdict = "refused"
        shutil.rmtree(self.run_folder)
        shutil.copytree(backup, self.run_folder, symlinks=True)
        shutil.rmtree(backup)


def _tells_of_its_start(case: Case) -> bool:
    """Whether a launch with this fault reports a step before the fault."""
    fault = case.fault or {}
    return fault.get("point") not in EARLY_POINTS and "seconds" not in fault.get("at", {})


def _needs_checkpoints(case: Case) -> bool:
    """Whether the fault is done to, or while a run reads, what a run has left."""
    return case.rest is not None or (case.fault or {}).get("point") in RESUME_POINTS


def _parameters(case: Case) -> dict[str, Any]:
    assert case.rest is not None
    return {key: value for key, value in case.rest.items() if key != "do"}


def _without_mounts(case: Case) -> Case:
    """The same fault by refused calls in the ranks, where nothing can be mounted."""
    by = case.fault["by"] if case.fault else (case.rest or {}).get("do")
    if by not in ("disk", "read_only"):
        return case
    point, name = ("shard half-written", "ENOSPC") if by == "disk" else ("shard made", "EROFS")
    op, pattern, _ = POINTS[point]
    spec = {"rank": "all", "op": op, "pattern": pattern, "nth": 1, "action": "error", "errno": name, "lasting": True}
    fault = {"by": "hook", "point": point, "spec": spec, "then": {"wait": True}}
    note = f"{name} in the ranks: nothing can be mounted here"
    return replace(case, rest=None, refused=False, fault=fault, note=note)


def _last_lines(text: str) -> str:
    errors = [line for line in text.splitlines() if _ERROR.search(line) and "ChildFailedError" not in line]
    return " | ".join(errors[:3] or text.splitlines()[-3:])[:600]
