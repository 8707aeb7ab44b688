"""One launch of the real command under torchrun, its processes, and what is done to them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).resolve().parent / "hooks"
MARK = "RETEMPER_FAULTS_LAUNCH"
"""Environment variable by which the processes of a launch are found, whoever their parent is by now."""
NUM_RANKS = 2
LONGEST_SECONDS = 240.0
"""A launch that takes longer hangs."""
INTERRUPTED = threading.Event()
"""Once set, nothing is waited for and nothing launched any more."""
_STEP = re.compile(r"^step +(\d+)/", re.MULTILINE)


def run_command(run_file: Path, run_folder: Path, options: tuple[str, ...]) -> list[str]:
    """The command whose repetition is to be enough, whatever happens."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
    script = str(ROOT / "engine" / "pretrain.py")
    return [*launcher, script, "--config", str(run_file), "--run_folder", str(run_folder), *options]


class Launch:
    """The command, started. Its output goes to ``log``.

    Args:
        command: see :func:`run_command`.
        log: file, made anew.
        hook: what hooks/fault_hook.py is to do in the ranks, but for the keys that this class fills in.
        run_folder: for the hook.
    """

    def __init__(self, command: list[str], log: Path, hook: dict[str, Any] | None = None, run_folder: Path = ROOT):
        if INTERRUPTED.is_set():
            raise RuntimeError("interrupted")
        self.log, self.mark = log, uuid.uuid4().hex
        self._seen: set[int] = set()
        self.fired_file = log.with_suffix(".fired")
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RETEMPER_FAULT"):
            environment.pop(name, None)
        if hook is not None:
            spec = {**hook, "folder": str(run_folder), "fired": str(self.fired_file)}
            environment["RETEMPER_FAULT"] = json.dumps(spec)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
        self.began = time.monotonic()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def text(self) -> str:
        """All output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def step(self) -> int:
        """The last step that it has reported; 0 before the first."""
        steps = _STEP.findall(self.text())
        return int(steps[-1]) if steps else 0

    def fired(self) -> list[dict[str, Any]]:
        """What the hooks have done."""
        if not self.fired_file.exists():
            return []
        return [json.loads(line) for line in self.fired_file.read_text().splitlines()]

    def ended(self) -> bool:
        """Whether the launcher and all ranks have gone."""
        return self.process.poll() is not None and not self.pids()

    def pids(self) -> dict[str, int]:
        """Living processes: ``launcher``, ``rank 0``, ``rank 1``, and others by number."""
        found: dict[str, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                settings = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"{MARK}={self.mark}".encode() not in settings or state == "Z":
                continue
            rank = next((item[5:].decode() for item in settings if item.startswith(b"RANK=")), None)
            if rank is not None and f"rank {rank}" not in found:
                found[f"rank {rank}"] = int(entry.name)
            elif int(entry.name) == self.process.pid:
                found["launcher"] = int(entry.name)
            else:
                found[f"process {entry.name}"] = int(entry.name)
        self._seen.update(found.values())
        return found

    def send(self, target: str, number: int) -> list[int]:
        """A signal to ``rank 0``, ``rank 1``, ``ranks``, ``launcher`` or ``node`` (launcher and ranks)."""
        sent = []
        for name, pid in sorted(self.pids().items()):
            if target == "node" or name == target or (target == "ranks" and name != "launcher"):
                send_signal(pid, number)
                sent.append(pid)
        return sent

    def wait(self, seconds: float) -> bool:
        """Until all have gone, or ``seconds`` have passed; whether they have."""
        return wait_for(self.ended, seconds)

    def end(self) -> None:
        """Leave no process behind."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            living = self.pids()
            for pid in living.values():
                send_signal(pid, signal.SIGKILL)
            if not living and self.process.poll() is not None and all(map(is_gone, self._seen)):
                return
            time.sleep(0.02)
        raise RuntimeError(f"processes outlive SIGKILL: {self.pids()}")


def is_gone(pid: int) -> bool:
    """Whether a process has let go of its files and locks. While it ends, its environment goes first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may have gone meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for(true: Callable[[], Any], seconds: float) -> bool:
    """Look again and again; whether it came true within ``seconds``."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until or INTERRUPTED.is_set():
            return False
        time.sleep(0.01)
    return True
