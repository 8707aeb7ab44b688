"""Run one host's part of a job, and end it when it is asked to. Started over ssh or pdsh; uses the standard library.

    python node.py stdin             # the job is the first line of standard input; then TERM or KILL, a line each
    python node.py job BASE64        # the job is in the command line, where other users of the machine can read it
    python node.py signal ID TERM    # ask the job of that id on this machine to end

A job is JSON: id, arguments, environment, folder and grace (seconds from SIGTERM to SIGKILL). If standard input ends,
the machine that started the job is gone, and the job is asked to end as well.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main(words: list[str]) -> int:
    """Run the command line, and return the exit status of the job."""
    if words[0] == "signal":
        return send_signal(words[1], words[2])
    if words[0] == "job":
        return run(json.loads(base64.b64decode(words[1])), lambda node: None)
    return run(json.loads(sys.stdin.readline()), lambda node: node.obey(sys.stdin))


def run(job: dict[str, Any], control: Callable[[Node], None]) -> int:
    """Run ``job`` to its end, with ``control`` in a thread, and return its exit status."""
    child = subprocess.Popen(
        job["arguments"],
        cwd=job["folder"],
        env={**os.environ, **job["environment"]},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    node = Node(child, job["grace"])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: node.end())
    threading.Thread(target=control, args=(node,), daemon=True).start()
    with pid_file(job["id"]):
        status = child.wait()
    return 128 - status if status < 0 else status


class Node:
    """The processes of a job on this machine."""

    def __init__(self, child: subprocess.Popen[bytes], grace: float) -> None:
        self._child, self._grace = child, grace
        self._timer: threading.Timer | None = None

    def obey(self, lines: Iterator[str]) -> None:
        """Read requests until their end."""
        for line in lines:
            if line.strip() == "KILL":
                self.kill()
            elif line.strip() == "TERM":
                self.end()
        self.end()

    def end(self) -> None:
        """Send SIGTERM, and SIGKILL after the grace period."""
        if self._timer is None and self._child.poll() is None:
            self._timer = threading.Timer(self._grace, self.kill)
            self._timer.daemon = True
            self._timer.start()
            self._child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the job and all processes that it has started; torchrun's are in sessions of their own."""
        for pid in [*descendants(self._child.pid), self._child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the processes below ``pid``."""
    parents = list(_parents())
    found, waiting = [], [pid]
    while waiting:
        above = waiting.pop()
        children = [child for child, parent in parents if parent == above]
        found += children
        waiting += children
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Yield (process, its parent) of all processes; images for containers may lack the program ``ps``."""
    if sys.platform.startswith("linux"):
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                # The name of the program, in parentheses, may contain anything.
                yield int(path.parent.name), int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        return
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        pid, parent = map(int, line.split())
        yield pid, parent


@contextlib.contextmanager
def pid_file(job_id: str) -> Iterator[None]:
    """Hold a file with this process's number, for :func:`send_signal`."""
    path = _pid_path(job_id)
    path.write_text(str(os.getpid()), encoding="ascii")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def send_signal(job_id: str, name: str) -> int:
    """Ask the job to end, or with KILL end it; return 1 if it does not run here."""
    try:
        pid = int(_pid_path(job_id).read_text(encoding="ascii"))
        if name == "KILL":
            for each in descendants(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return 1
    return 0


def _pid_path(job_id: str) -> Path:
    return Path(tempfile.gettempdir()) / f"retemper-{os.getuid()}-{job_id}.pid"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
