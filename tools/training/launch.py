"""Start the ranks of a run on this machine, wait for them, and pass on signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def training_command(config_file: Path, ranks: int) -> list[str]:
    """Return the command line that trains with ``config_file``."""
    recipe = [str(ROOT / "engine" / "pretrain.py"), "--config", str(config_file)]
    if ranks == 1:
        return [sys.executable, *recipe]
    torchrun = str(ROOT / "launch" / "quiet_torchrun.py")
    return [sys.executable, torchrun, "--standalone", "--nproc-per-node", str(ranks), *recipe]


def run_training(command: list[str]) -> int:
    """Run ``command`` to its end and return its exit status. Requests to stop reach it: it saves, and ends."""
    process = subprocess.Popen(command)
    with _passing_on(process):
        status = process.wait()
    return status if status >= 0 else 128 - status


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the whole process group, so the process has it already.
        if number != signal.SIGINT or not sys.stdin.isatty():
            process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
