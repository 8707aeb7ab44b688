"""Describe what each host of a hostfile runs: a torchrun of its ranks, with chosen environment variables."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...engine.errors import UserError
from .hostfile import Host

ROOT = Path(__file__).resolve().parents[2]
FORWARDED = (
    *("NCCL_*", "GLOO_*", "HF_*", "RETEMPER_*", "TORCH_CPP_LOG_LEVEL", "OMP_NUM_THREADS"),
    *("PYTHONPATH", "PATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
)
"""Patterns of the environment variables that the hosts get."""
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SECOND_CHANCE = 10
"""Seconds that torchrun gets, after it has killed its ranks, before it is killed."""


@dataclass(frozen=True)
class Settings:
    """What all hosts have in common."""

    hosts: Sequence[Host]
    program: Path
    arguments: Sequence[str]
    """Of the program."""
    python: str
    folder: Path
    """Working directory on all hosts."""
    environment: Mapping[str, str]
    port: int = 29400
    """Of the rendezvous, on the first host."""
    max_restarts: int = 0
    grace: int = 300
    """Seconds to save a checkpoint when the run is asked to stop."""
    join_timeout: int = 900
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def job(self, number: int) -> dict[str, Any]:
        """Return the job of host ``number`` as plain values; see :mod:`.node`."""
        return {
            "id": f"{self.id}-{number}",
            "arguments": self.torchrun(number),
            "environment": {
                "PYTHONUNBUFFERED": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # else pages of stack frames if the store is gone
                **self.environment,
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace),
            },
            "folder": str(self.folder),
            "grace": self.grace + _SECOND_CHANCE,
        }

    def torchrun(self, number: int) -> list[str]:
        """Return the command line of torchrun on host ``number``."""
        host, first = self.hosts[number], self.hosts[0]
        is_first = str(number == 0).lower()  # torchrun's own guess compares names, which may be aliases
        return [
            *(self.python, str(ROOT / "launch" / "quiet_torchrun.py")),
            *("--nnodes", str(len(self.hosts))),
            *("--nproc-per-node", "gpu" if host.slots is None else str(host.slots)),
            *("--max-restarts", str(self.max_restarts)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:{self.port}"),
            *("--rdzv-id", self.id, "--rdzv-conf", f"is_host={is_first},join_timeout={self.join_timeout}"),
            *("--local-addr", host.address),
            *(str(self.program), *self.arguments),
        ]


def forwarded(environment: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    """Return the variables of this process that the hosts get.

    Args:
        environment: of this process.
        more: names given with ``--export``.

    Raises:
        UserError: one of ``more`` is no name, or not set.
    """
    for name in more:
        if not _NAME.fullmatch(name):
            raise UserError(f"--export {name}: not the name of an environment variable")
        if name not in environment:
            raise UserError(f"--export {name}: this variable is not set; set it, or remove the option")
    chosen = {name: value for name, value in environment.items() if any(fnmatchcase(name, each) for each in FORWARDED)}
    return chosen | {name: environment[name] for name in more}
