"""Start and end jobs on hosts through ssh or pdsh."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hostfile import Host

NODE = Path(__file__).resolve().with_name("node.py")
_CONNECT_SECONDS = 10
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY")
_SIGNAL_SECONDS = 30


class Transport(ABC):
    """A program that runs commands on other hosts."""

    name: str

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = options

    @abstractmethod
    def command(self, host: Host, remote: str) -> list[str]:
        """Return the command line that runs ``remote``, a line for a shell, on ``host``."""

    @abstractmethod
    def start(self, host: Host, python: str, job: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Start ``job`` on ``host``. The output of the process is that of the job."""

    @abstractmethod
    def signal(self, host: Host, python: str, job: dict[str, Any], process: subprocess.Popen[bytes], name: str) -> None:
        """Ask the job to end (TERM), or end it (KILL)."""

    def withheld(self, job: dict[str, Any]) -> list[str]:
        """Return the variables that ``start`` does not send, because others could read them."""
        return []


class Ssh(Transport):
    """ssh: the job and requests travel through its standard input."""

    name = "ssh"

    def command(self, host: Host, remote: str) -> list[str]:
        """Return the command line."""
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", "-o", "ServerAliveInterval=30"]
        return ["ssh", *options, *self._options, host.name, remote]

    def start(self, host: Host, python: str, job: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Start the job."""
        process = _popen(self.command(host, shlex.join([python, str(NODE), "stdin"])), subprocess.PIPE)
        _write(process, json.dumps(job))
        return process

    def signal(self, host: Host, python: str, job: dict[str, Any], process: subprocess.Popen[bytes], name: str) -> None:
        """Send the request."""
        _write(process, name)


class Pdsh(Transport):
    """pdsh, which does not pass standard input on: the job is in the command line."""

    name = "pdsh"

    def command(self, host: Host, remote: str) -> list[str]:
        """Return the command line."""
        # -S: the exit status is that of the command; -N: no host name before each line.
        return ["pdsh", "-S", "-N", "-R", "ssh", *self._options, "-w", host.name, remote]

    def start(self, host: Host, python: str, job: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Start the job."""
        held = self.withheld(job)
        environment = {name: value for name, value in job["environment"].items() if name not in held}
        packed = base64.b64encode(json.dumps({**job, "environment": environment}).encode()).decode()
        return _popen(self.command(host, shlex.join([python, str(NODE), "job", packed])), subprocess.DEVNULL)

    def signal(self, host: Host, python: str, job: dict[str, Any], process: subprocess.Popen[bytes], name: str) -> None:
        """Send the request."""
        subprocess.run(
            self.command(host, shlex.join([python, str(NODE), "signal", job["id"], name])),
            check=False,
            timeout=_SIGNAL_SECONDS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def withheld(self, job: dict[str, Any]) -> list[str]:
        """Return the variables whose names are those of secrets."""
        return [name for name in job["environment"] if _SECRET.search(name)]


TRANSPORTS: dict[str, type[Transport]] = {"ssh": Ssh, "pdsh": Pdsh}


def _popen(command: list[str], stdin: int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C goes to this program only, which asks the jobs to end.
    return subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def _write(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
    except BrokenPipeError:
        pass  # the process has ended, and its output tells why
