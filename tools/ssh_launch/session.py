"""Run the jobs of all hosts to their end: logs, requests to stop, and one exit status."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from ...engine.errors import UserError
from .hostfile import Host
from .job import Settings
from .transport import Transport

_POLL_SECONDS = 0.1
_CHECK_SECONDS = 30
_KILL_SECONDS = 20
"""How long a killed job may take before the connection to its host is closed."""
_SHOWN_LINES = 5


def require_hosts(settings: Settings, transport: Transport) -> None:
    """Check that each host can be reached without a password, and has the folder, the interpreter and the program.

    Raises:
        UserError: a line for each host that cannot be used.
    """

    def check(host: Host) -> str | None:
        files = [settings.python, str(settings.program)]
        tests = " && ".join(f"test -e {shlex.quote(file)}" for file in files if "/" in file)
        remote = f"cd {shlex.quote(str(settings.folder))} && {tests or 'true'}"
        return _failure(transport.command(host, f"sh -c {shlex.quote(remote)}"))

    with ThreadPoolExecutor(min(32, len(settings.hosts))) as pool:
        failures = list(pool.map(check, settings.hosts))
    where = f"with the folder {settings.folder}, {settings.python} and {settings.program}"
    problems = [
        f"{host.name}: {failure}; it must be reachable with `{transport.name} {host.name}` without a password, {where}"
        for host, failure in zip(settings.hosts, failures, strict=True)
        if failure is not None
    ]
    if problems:
        raise UserError(*problems)


def _failure(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return f"the program {command[0]} is not installed here"
    except subprocess.TimeoutExpired:
        return f"no answer within {_CHECK_SECONDS} s"
    if done.returncode == 0:
        return None
    said = done.stdout.decode(errors="replace").strip().splitlines()
    return said[-1].strip() if said else f"a file or folder is missing there (status {done.returncode})"


def run_session(settings: Settings, transport: Transport, logs: Path) -> int:
    """Run all jobs, and return the largest exit status.

    If one fails, or this process gets SIGINT or SIGTERM, all others are asked to end, and killed after the grace
    period. A second signal kills them at once.

    Args:
        settings: of the jobs.
        transport: how to reach the hosts.
        logs: folder of a log for each host; the output of the first one is printed as well.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--logs {logs}: {error.strerror or error}; name a folder that can be written") from None
    session = _Session(settings, transport, logs)
    with _signals(session.request), contextlib.ExitStack() as files:
        session.start(files)
        session.wait()
    return session.report()


class _Session:
    def __init__(self, settings: Settings, transport: Transport, logs: Path) -> None:
        self._settings, self._transport, self._logs = settings, transport, logs
        self._jobs = [settings.job(number) for number in range(len(settings.hosts))]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._requests = 0
        """Signals that this process has received."""
        self._kill_at: float | None = None
        self._first_failure: int | None = None

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: :meth:`wait` acts on it."""
        self._requests += 1

    def start(self, files: contextlib.ExitStack) -> None:
        """Start the jobs of all hosts."""
        for number, host in enumerate(self._settings.hosts):
            process = self._transport.start(host, self._settings.python, self._jobs[number])
            log = files.enter_context(open(self.log(number), "ab", buffering=0))
            assert process.stdout is not None
            reader = threading.Thread(target=_copy, args=(process.stdout, log, number == 0), daemon=True)
            reader.start()
            self._processes.append(process)
            self._readers.append(reader)

    def wait(self) -> None:
        """Wait for all jobs, and end the others after a failure or a signal."""
        while running := self._running():
            failed = [n for n, process in enumerate(self._processes) if process.poll() not in (None, 0)]
            if failed and self._first_failure is None:
                self._first_failure = failed[0]
            if (failed or self._requests) and self._kill_at is None:
                if self._requests:
                    print("asking all hosts to stop; another signal kills them", file=sys.stderr, flush=True)
                self._signal(running, "TERM")
                self._kill_at = time.monotonic() + self._jobs[0]["grace"]
            if self._kill_at is not None and (self._requests > 1 or time.monotonic() > self._kill_at):
                self._kill(running)
                break
            time.sleep(_POLL_SECONDS)
        for reader in self._readers:
            reader.join(timeout=_KILL_SECONDS)

    def report(self) -> int:
        """Print which host failed first, with the end of its log, and return the largest exit status."""
        statuses = [_status(process) for process in self._processes]
        worst = max(statuses)
        if worst and not self._requests:
            first = self._first_failure if self._first_failure is not None else statuses.index(worst)
            print(f"error: {self._settings.hosts[first].name}: exit status {statuses[first]}", file=sys.stderr)
            if first != 0:  # the output of the first host was printed
                lines = self.log(first).read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(lines[-_SHOWN_LINES:]), file=sys.stderr)
            print(f"the logs of all hosts are in {self._logs}", file=sys.stderr)
        return worst

    def log(self, number: int) -> Path:
        """Return the path of a host's log."""
        return self._logs / f"{self._settings.hosts[number].name}.log"

    def _running(self) -> list[int]:
        return [number for number, process in enumerate(self._processes) if process.poll() is None]

    def _signal(self, numbers: Sequence[int], name: str) -> None:
        def send(number: int) -> None:
            host = self._settings.hosts[number]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._transport.signal(host, self._settings.python, self._jobs[number], self._processes[number], name)

        with ThreadPoolExecutor(min(32, len(numbers))) as pool:
            list(pool.map(send, numbers))

    def _kill(self, numbers: Sequence[int]) -> None:
        """Kill jobs, and close the connections of those that do not end."""
        self._signal(numbers, "KILL")
        deadline = time.monotonic() + _KILL_SECONDS
        while self._running() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for number in self._running():
            self._processes[number].kill()
            self._processes[number].wait()


def _status(process: subprocess.Popen[bytes]) -> int:
    status = process.returncode
    return 128 - status if status < 0 else status


def _copy(source: BinaryIO, log: BinaryIO, printed: bool) -> None:
    """Copy lines of a host to its log, and to the terminal. A full disk loses lines of the log, not the job."""
    failed = False
    for line in source:
        try:
            log.write(line)
        except OSError as error:
            if not failed:
                print(f"note: {log.name} cannot be written: {error.strerror or error}", file=sys.stderr, flush=True)
            failed = True
        if printed:
            with contextlib.suppress(OSError, ValueError):  # the reader of our output has gone; the log is complete
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()


@contextlib.contextmanager
def _signals(handler: object) -> Iterator[None]:
    """Handle SIGINT and SIGTERM by ``handler`` meanwhile."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
